"""Make what a SuperLink and its SuperNodes need for TLS and authentication.

``certificates.py superlink FOLDER HOST...`` makes, for a SuperLink that is reached under these
names or addresses,

- FOLDER/authority/ca.pem, which everyone who connects to the SuperLink needs,
- FOLDER/superlink/certificate.pem and key.pem, for the SuperLink alone,

and ``certificates.py supernode FOLDER``, at each site,

- FOLDER/supernode/key, for this SuperNode alone,
- FOLDER/supernode/key.pub, which `flwr supernode register` takes.

What is there already is kept. The authority's own key is never written: nobody signs another
certificate with it. To renew a certificate, remove it, and give the new ca.pem to everyone.

``certificates.py superlink FOLDER HOST... --ca-key FILE`` keeps the authority's key in FILE, which
the SuperLink must not see, and signs a new certificate at each call; ca.pem stays as it is.
"""

import argparse
import ipaddress
import os
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

# Of an authority whose key is kept.
CA_DAYS = 3650

# A SuperLink's own ServerApps connect to it under these.
LOCAL = ("localhost", "127.0.0.1")

# All must be said; an authority signs certificates and does nothing else.
KEY_USAGES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


def make_superlink(
    folder: Path, hosts: Sequence[str], days: int, ca_key_file: Path | None = None
) -> list[Path]:
    """Make an authority, and a certificate for a SuperLink under these hosts; return the files.

    With ``ca_key_file`` the authority is the one whose key is in it, and is made once.
    """
    ca_file = folder / "authority" / "ca.pem"
    certificate_file = folder / "superlink" / "certificate.pem"
    key_file = folder / "superlink" / "key.pem"
    files = [ca_file, certificate_file, key_file]
    if not ca_key_file and all(file.exists() for file in files):
        return files
    if ca_key_file and (ca_file.exists() or ca_key_file.exists()):
        ca_key, ca = read_authority(ca_key_file, ca_file)
    else:
        ca_key = ec.generate_private_key(ec.SECP256R1())
        ca = authority(ca_key, CA_DAYS if ca_key_file else days)
        if ca_key_file:
            write(ca_key_file, private_pem(ca_key), mode=0o600)
        write(ca_file, ca.public_bytes(Encoding.PEM))
    key = ec.generate_private_key(ec.SECP256R1())
    signed = server_certificate([*hosts, *LOCAL], key.public_key(), ca, ca_key, days)
    write(certificate_file, signed.public_bytes(Encoding.PEM))
    write(key_file, private_pem(key), mode=0o600)
    return files


def read_authority(
    key_file: Path, certificate_file: Path
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """Return the key and the certificate of an authority; exit if they are not those of one."""
    missing = [str(file) for file in (key_file, certificate_file) if not file.exists()]
    if missing:
        raise SystemExit(
            f"{missing[0]} is missing, half of the authority; right would be to bring it back, or "
            "to remove the other half as well and to give the new ca.pem to everyone"
        )
    key = load_pem_private_key(key_file.read_bytes(), password=None)
    certificate = x509.load_pem_x509_certificate(certificate_file.read_bytes())
    if not isinstance(key, ec.EllipticCurvePrivateKey) or (
        key.public_key() != certificate.public_key()
    ):
        raise SystemExit(
            f"{key_file} is not the key of {certificate_file}; right would be the one made with it"
        )
    return key, certificate


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a key as a file has it."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def make_supernode(folder: Path) -> list[Path]:
    """Make the keys by which a SuperLink knows a SuperNode; return the files."""
    key_file = folder / "supernode" / "key"
    public_file = folder / "supernode" / "key.pub"
    if key_file.exists() and public_file.exists():
        return [key_file, public_file]
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    write(key_file, private, mode=0o600)
    write(public_file, key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    return [key_file, public_file]


def authority(key: ec.EllipticCurvePrivateKey, days: int) -> x509.Certificate:
    """Return the certificate, signed with its own key, that signs a server's."""
    now = datetime.now(UTC)
    name = common_name("pFedGPA authority")
    usage = dict.fromkeys(KEY_USAGES, False) | {"key_cert_sign": True}
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))  # clocks differ
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, SHA256())
    )


def server_certificate(
    hosts: Iterable[str],
    key: ec.EllipticCurvePublicKey,
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    days: int,
) -> x509.Certificate:
    """Return the certificate of a server under these hosts, no longer valid than its authority."""
    now = datetime.now(UTC)
    names = x509.SubjectAlternativeName([general_name(host) for host in dict.fromkeys(hosts)])
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(common_name("pFedGPA SuperLink"))
        .issuer_name(ca.subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(max(now - timedelta(hours=1), ca.not_valid_before_utc))
        .not_valid_after(min(now + timedelta(days=days), ca.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(names, critical=False)
        .add_extension(identifier, critical=False)
        .sign(ca_key, SHA256())
    )


def common_name(text: str) -> x509.Name:
    """Return a name that consists of nothing else."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def general_name(host: str) -> x509.GeneralName:
    """Return a host as a certificate has it, an address or a name."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def write(file: Path, content: bytes, mode: int = 0o644) -> None:
    """Write a file that at no moment is open to more than ``mode`` says."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
        stream.write(content)


def main() -> None:
    """Do what the command line says and name the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="role", required=True)
    superlink = commands.add_parser("superlink")
    superlink.add_argument("folder", type=Path)
    superlink.add_argument("host", nargs="+")
    superlink.add_argument("--days", type=int, default=365, help="how long they are valid")
    superlink.add_argument("--ca-key", type=Path, metavar="FILE", help="the authority's key")
    supernode = commands.add_parser("supernode")
    supernode.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if arguments.role == "superlink":
        files = make_superlink(arguments.folder, arguments.host, arguments.days, arguments.ca_key)
    else:
        files = make_supernode(arguments.folder)
    print(*files, sep="\n")


if __name__ == "__main__":
    main()
