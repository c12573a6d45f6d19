"""Input formats -> `Sample`: LLaVA json, chat-messages jsonl, WebDataset tars, Parquet and Hugging Face datasets.

A record of any shape may stand in any container, so the container is told by the file and the shape by the record.
Records are read when asked for: opening data of a million conversations keeps their places, not their objects.
"""

from genrecal.samples.fields import FieldMap
from genrecal.samples.images import IMAGE_FORMATS, decode_image, open_image
from genrecal.samples.record import make_key, parse_record
from genrecal.samples.sample import ROLES, BadRecord, ImageRef, ImageSource, Message, Sample
from genrecal.samples.sample_set import SampleSet, Selection, open_samples, parse_split

__all__ = [
    "IMAGE_FORMATS",
    "ROLES",
    "BadRecord",
    "FieldMap",
    "ImageRef",
    "ImageSource",
    "Message",
    "Sample",
    "SampleSet",
    "Selection",
    "decode_image",
    "make_key",
    "open_image",
    "open_samples",
    "parse_record",
    "parse_split",
]
