"""The cache job: a teacher's states over (image, question, answer) samples, written as shards. Never imports `train`."""
