"""Keys at work: sealed broker payloads (Fernet) and agent tokens (JWT)."""

from leoflow_celery.security.sealing import Sealer
from leoflow_celery.security.tokens import AgentIdentity, TokenIssuer, holder_name

__all__ = ["AgentIdentity", "Sealer", "TokenIssuer", "holder_name"]
