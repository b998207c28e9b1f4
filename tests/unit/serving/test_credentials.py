"""Signed statements in the pictures that are served, read back by C2PA's own library."""

import base64
import datetime
import io
import json
import sys
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from PIL import Image

from muse_maskgit_pytorch import Muse
from muse_maskgit_pytorch.cli.main import main
from muse_maskgit_pytorch.images import record_of
from muse_maskgit_pytorch.serving.asked import FORMATS, Wrong
from tests.unit.serving.test_http import FAST, muse, png, serve  # noqa: F401

# untyped for whoever has none to check our types with
c2pa: Any = pytest.importorskip("c2pa")
x509: Any = pytest.importorskip("cryptography.x509")
hashes: Any = pytest.importorskip("cryptography.hazmat.primitives.hashes")
serialization: Any = pytest.importorskip("cryptography.hazmat.primitives.serialization")
ec: Any = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ec")
from muse_maskgit_pytorch.serving.credentials import Credentials  # noqa: E402

GIVEN = Image.radial_gradient("L").resize((32, 32)).convert("RGB")


def certificate(name: str, key: Any, root: Any) -> bytes:
    """Of the root, or of somebody who signs pictures, in PEM."""
    oids = x509.NameOID.COMMON_NAME, x509.NameOID.ORGANIZATION_NAME
    names = [x509.Name([x509.NameAttribute(oid, of) for oid in oids]) for of in (name, "root")]
    own, now = key is root, datetime.datetime.now(datetime.UTC)
    uses = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False
    )
    uses |= dict.fromkeys(("encipher_only", "decipher_only"), False)
    made = x509.CertificateBuilder(*names, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(now - datetime.timedelta(1))
    made = made.not_valid_after(now + datetime.timedelta(1))
    extensions: list[tuple[Any, bool]] = [
        (x509.BasicConstraints(own, None), True),
        (x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(root.public_key()), False),
        (x509.KeyUsage(digital_signature=not own, key_cert_sign=own, crl_sign=own, **uses), True),
    ]
    if not own:
        extensions.append(
            (x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.EMAIL_PROTECTION]), False)
        )
    for extension, critical in extensions:
        made = made.add_extension(extension, critical)
    return made.sign(root, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    """A certificate with its root's, and its key."""
    folder = tmp_path_factory.mktemp("c2pa")
    root, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    chain, private = folder / "chain.pem", folder / "key.pem"
    chain.write_bytes(certificate("me", key, root) + certificate("root", root, root))
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return chain, private


def read(picture: bytes, kind: str) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """Whether it is valid, what was done, and all that is said."""
    reader = c2pa.Reader(FORMATS[kind], io.BytesIO(picture))
    said = json.loads(reader.json())
    [actions] = [
        assertion["data"]["actions"]
        for assertion in said["manifests"][said["active_manifest"]]["assertions"]
        if assertion["label"].startswith("c2pa.actions")
    ]
    return reader.get_validation_state(), actions, said


def test_pictures_say_that_a_model_made_them(muse: Muse, files):  # noqa: F811
    async def talk(http: httpx.AsyncClient) -> None:
        picture, kind = b"", ""
        for kind in FORMATS:
            asked = dict(prompt="red apple", seed=7, output_format=kind, **FAST)
            answer = await http.post("/v1/images/generations", json=asked)
            picture = base64.b64decode(answer.json()["data"][0]["b64_json"])
            state, [action], _ = read(picture, kind)
            assert (state, action["action"]) == ("Valid", "c2pa.created")
            assert action["digitalSourceType"].endswith("/trainedAlgorithmicMedia")
            assert len(picture) < 30_000
            if kind == "png":
                [alone] = muse("red apple", seeds=7, **FAST)
                drawn = Image.open(io.BytesIO(picture))
                assert drawn.tobytes() == alone.tobytes()
                assert record_of(drawn) == record_of(alone)
        changed = bytearray(picture)
        changed[-20] ^= 1
        assert read(bytes(changed), kind)[0] == "Invalid"

    serve(muse, talk, sign=Credentials(*files).signed)


def test_edits_name_what_they_were_made_from(muse: Muse, files):  # noqa: F811
    credentials = Credentials(*files)

    async def talk(http: httpx.AsyncClient) -> None:
        for sent, manifests in ((png(GIVEN), 1), (credentials.signed(png(GIVEN), "png"), 2)):
            answer = await http.post(
                "/v1/images/variations", files={"image": sent}, data=dict(strength="0.5")
            )
            picture = base64.b64decode(answer.json()["data"][0]["b64_json"])
            state, actions, said = read(picture, "png")
            assert state == "Valid"
            assert [each["action"] for each in actions] == ["c2pa.opened", "c2pa.edited"]
            assert actions[1]["digitalSourceType"].endswith("/compositeWithTrainedAlgorithmicMedia")
            [parent] = said["manifests"][said["active_manifest"]]["ingredients"]
            assert parent["relationship"] == "parentOf"
            assert len(said["manifests"]) == manifests

    serve(muse, talk, sign=credentials.signed)


def test_damaged_credentials_of_strangers(files):
    credentials = Credentials(*files)
    signed = credentials.signed(png(GIVEN), "png")
    where = signed.index(b"caBX")
    end = where + 4 + int.from_bytes(signed[where - 4 : where])
    for place in (4, 40, 200, 2000, -300):
        chunk = bytearray(signed[where:end])
        chunk[place] ^= 0xFF
        check = zlib.crc32(chunk).to_bytes(4)
        sent = signed[:where] + bytes(chunk) + check + signed[end + 4 :]
        with suppress(Wrong):  # or they are named as they are
            state, actions, _ = read(credentials.signed(png(GIVEN), "png", sent), "png")
            assert (state, actions[0]["action"]) == ("Valid", "c2pa.opened")


def test_what_does_not_sign(muse: Muse, files, tmp_path, monkeypatch, capsys):  # noqa: F811
    chain, key = files
    other = tmp_path / "other.pem"
    other.write_bytes(
        ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    (tmp_path / "no.pem").write_text("no key")
    for pair in ((key, chain), (chain, tmp_path / "no.pem"), (tmp_path / "no.pem", key)):
        with pytest.raises(ValueError, match="do not sign"):
            Credentials(*pair)
    command = ["serve", "--model", str(muse.save(tmp_path / "tiny.safetensors")), "--c2pa"]
    assert main([*command, str(key), str(chain)]) == 2
    assert "do not sign" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "none.pem"), str(key)]) == 2
    assert "none.pem" in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "muse_maskgit_pytorch.serving.credentials")
    monkeypatch.setitem(sys.modules, "c2pa", None)
    assert main([*command, str(chain), str(key)]) == 2
    assert "muse-maskgit-pytorch[c2pa]" in capsys.readouterr().err
