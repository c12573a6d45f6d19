"""The cache's format: records, codecs, writer, manifest, reader, order. Needs neither transformers nor vllm."""
