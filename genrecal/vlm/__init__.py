"""What both sides know of a VLM: loading, body and head, conversations -> token ids and segments."""
