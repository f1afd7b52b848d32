"""Certificates that live as long as a test: an authority of its own, and one server."""

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Certificates", "make_certificates"]


@dataclass(frozen=True, slots=True)
class Certificates:
    """Files of one server: what it shows, and what its clients trust."""

    authority: Path
    """PEM of the authority that signed: a client's ``cafile``."""
    chain: Path
    """PEM of the server's certificate."""
    key: Path
    """PEM of the server's private key, PKCS #8, not encrypted."""


def make_certificates(
    folder: Path, names: tuple[str, ...] = ("127.0.0.1", "localhost")
) -> Certificates:
    """Write an authority and a server's certificate for ``names`` into ``folder``.

    A name that is not the server's makes a certificate that a careful client refuses.
    """
    import trustme
    from cryptography.hazmat.primitives import serialization

    folder.mkdir(parents=True, exist_ok=True)
    authority = trustme.CA()
    issued = authority.issue_cert(*names)
    # Java reads PKCS #8 only, and trustme writes the older form.
    key = serialization.load_pem_private_key(issued.private_key_pem.bytes(), password=None)
    files = Certificates(folder / "authority.pem", folder / "server.pem", folder / "server.key")
    authority.cert_pem.write_to_path(files.authority)
    files.chain.write_bytes(b"".join(each.bytes() for each in issued.cert_chain_pems))
    files.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    files.key.chmod(0o600)
    return files
