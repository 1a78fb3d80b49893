"""Keys at work: sealed payloads (Fernet) and agent tokens (JWT)."""

from leoflow_celery.security.sealing import KeyRing, Scope, Sealer
from leoflow_celery.security.tokens import AgentIdentity, TokenIssuer, holder_name

__all__ = ["AgentIdentity", "KeyRing", "Scope", "Sealer", "TokenIssuer", "holder_name"]
