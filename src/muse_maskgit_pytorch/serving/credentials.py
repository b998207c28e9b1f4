"""Content Credentials: signed statements, in a picture's file, of where it comes from (C2PA)."""

from __future__ import annotations

import io
import threading
from importlib import import_module
from importlib.metadata import version
from os import PathLike
from typing import Any

from PIL import Image

from ..arguments import as_path
from .asked import FORMATS, Wrong

# untyped for whoever has none of them to check our types with
c2pa: Any = import_module("c2pa")
serialization: Any = import_module("cryptography.hazmat.primitives.serialization")
ed25519: Any = import_module("cryptography.hazmat.primitives.asymmetric.ed25519")
rsa: Any = import_module("cryptography.hazmat.primitives.asymmetric.rsa")

MIXED = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
SETTINGS = {
    # what a stranger's picture names is not asked for
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
    "builder": {"thumbnail": {"enabled": False}},
}


class Credentials:
    """Signs pictures: that a model made them, or changed those that are named.

    The statement is C2PA's, version 2: "c2pa.created" by a trained algorithm; or "c2pa.opened" with
    the picture that was sent and its own credentials, and "c2pa.edited". The signature has no date
    of an authority's, since none is asked.

    Args:
        certificate: PEM file of the signer's certificate, and those between it and its root.
        key: PEM file of its private key: of a curve (P-256, P-384, P-521), Ed25519 or RSA.

    Raises:
        ValueError: they cannot be read, or C2PA signs with none such.
    """

    def __init__(self, certificate: str | PathLike[str], key: str | PathLike[str]):
        files = as_path(certificate, "certificate"), as_path(key, "key")
        chain, private = (file.read_bytes() for file in files)
        try:
            kind = _algorithm(private)
            info = c2pa.C2paSignerInfo(alg=kind, sign_cert=chain, private_key=private, ta_url=None)
            signer = c2pa.Signer.from_info(info)
            self._context = c2pa.Context(c2pa.Settings.from_dict(SETTINGS), signer)
            self._lock = threading.Lock()  # the library's objects are for one thread at a time
            picture = io.BytesIO()
            Image.new("RGB", (8, 8)).save(picture, "PNG")
            self.signed(picture.getvalue(), "png")
        except (ValueError, TypeError, c2pa.C2paError) as error:
            raise ValueError(
                f"{files[0]} and {files[1]} do not sign: they must be a certificate for C2PA, with "
                f"those up to its root, and its private key without a password, in PEM ({error})"
            ) from None

    def signed(self, picture: bytes, kind: str, sent: bytes | None = None) -> bytes:
        """A picture's file, with credentials.

        Args:
            picture: the file.
            kind: one of `FORMATS`.
            sent: the file that it was made from; None where it was made from words alone.

        Raises:
            Wrong: what was sent has credentials that are damaged.
        """
        agent = {"name": "muse-maskgit-pytorch", "version": version("muse-maskgit-pytorch")}
        manifest = {"claim_generator_info": [agent], "format": FORMATS[kind], "assertions": []}
        signed = io.BytesIO()
        with self._lock, c2pa.Builder(manifest, self._context) as builder:
            if sent is None:
                source = c2pa.C2paDigitalSourceType.TRAINED_ALGORITHMIC_MEDIA
                builder.set_intent(c2pa.C2paBuilderIntent.CREATE, source)
            else:
                builder.set_intent(c2pa.C2paBuilderIntent.EDIT)
                with Image.open(io.BytesIO(sent)) as image:
                    given = FORMATS[str(image.format).lower()]
                parent = {"title": "image", "relationship": "parentOf"}
                try:
                    builder.add_ingredient(parent, given, io.BytesIO(sent))
                except c2pa.C2paError:
                    raise Wrong(
                        "image has content credentials that are damaged: send it without", "image"
                    ) from None
                action = {"action": "c2pa.edited", "softwareAgent": agent}
                builder.add_action(action | {"digitalSourceType": MIXED})
            builder.sign(FORMATS[kind], io.BytesIO(picture), signed)
        return signed.getvalue()


def _algorithm(key: bytes) -> str:
    """C2PA's name of how such a key signs.

    Raises:
        ValueError: it signs with none such.
    """
    private = serialization.load_pem_private_key(key, None)
    if curve := getattr(private, "curve", None):
        name = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}.get(curve.name)
    elif isinstance(private, ed25519.Ed25519PrivateKey):
        name = "ed25519"
    else:
        name = "ps256" if isinstance(private, rsa.RSAPrivateKey) else None
    if name is None:
        raise ValueError("a key of another kind")
    return name
