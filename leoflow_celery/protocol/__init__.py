"""The gRPC agent protocol ``leoflow.agent.v1``: messages generated from ``agent.proto``, methods in ``service``."""
