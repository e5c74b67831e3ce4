"""Why a TLS handshake failed, in words and as a label."""

import ssl

from stator.errors import NotTrusted

__all__ = ["refusal"]

_EXPIRED, _NOT_YET = 10, 9
_WRONG_NAMES = frozenset({62, 63, 64})
"""X509_V_ERR_*: host name, email, IP address"""

_ALERTS = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": ("no_certificate", "the other side showed no certificate, and mutual TLS demands one"),
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": (
        "no_certificate",
        "the other side demands a certificate; set tls.cert_path or client_cert_path",
    ),
    "TLSV1_ALERT_UNKNOWN_CA": ("untrusted", "the other side does not know the authority of our certificate"),
    "TLSV1_ALERT_DECRYPT_ERROR": (
        "untrusted",
        "our certificate is not of the authority that the other side knows by that name",
    ),
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": ("untrusted", "the other side does not accept our certificate"),
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": ("untrusted", "our certificate is not one for this use"),
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": ("expired", "the other side says that our certificate has expired"),
    "SSLV3_ALERT_CERTIFICATE_REVOKED": ("untrusted", "the other side says that our certificate was revoked"),
    "SSLV3_ALERT_BAD_CERTIFICATE": (
        "bad_certificate",
        "the other side refused our certificate; as a rule it demands another name",
    ),
    "TLSV1_ALERT_ACCESS_DENIED": ("untrusted", "the other side refused our certificate"),
    "SSLV3_ALERT_HANDSHAKE_FAILURE": ("versions", "the other side refused: no common cipher, or it demands a certificate"),
    "TLSV1_ALERT_PROTOCOL_VERSION": ("versions", "no common version of TLS"),
    "UNSUPPORTED_PROTOCOL": ("versions", "no common version of TLS"),
    "NO_SHARED_CIPHER": ("versions", "no common cipher"),
    "WRONG_VERSION_NUMBER": ("plaintext", "the other side does not speak TLS"),
    "HTTP_REQUEST": ("plaintext", "the other side does not speak TLS"),
    "SSLV3_ALERT_UNEXPECTED_MESSAGE": ("plaintext", "the other side took our TLS for something else"),
}


def refusal(error: ssl.SSLError, *, dialling: bool) -> NotTrusted:
    """What `error` means. The reason is "tls" where it says nothing about trust."""
    reason, text = _meaning(error)
    hint = " (tls.ca_cert_path)" if dialling else " (tls.client_ca_cert_path)"
    return NotTrusted(
        text + (hint if isinstance(error, ssl.SSLCertVerificationError) and reason == "untrusted" else ""), reason=reason
    )


def _meaning(error: ssl.SSLError) -> tuple[str, str]:
    if isinstance(error, ssl.SSLCertVerificationError):
        said = error.verify_message
        if error.verify_code in (_EXPIRED, _NOT_YET):
            return "expired", f"the other side's certificate is not valid at this time: {said}"
        if error.verify_code in _WRONG_NAMES:
            return "wrong_name", f"the other side's certificate has another name: {said} (tls.server_name)"
        return "untrusted", f"the other side's certificate is not trusted: {said}"
    return _ALERTS.get(error.reason or "", ("tls", f"TLS failed: {error.reason or error}"))
