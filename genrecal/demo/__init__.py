"""The whole pipeline on bundled data and tiny models."""
