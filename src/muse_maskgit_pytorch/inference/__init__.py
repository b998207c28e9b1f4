"""What makes a finished model faster, from outside."""
