"""Methods of the registry that vLLM does not serve, and those that it serves with a calibration."""

REFUSED = {  # and why; whatever is not here must be served
    "kvzip": "read the text again", "kvcompose": "read the text again", "kvgrad": "read the text again",
    "many-questions": "read the text again",
    "kvzap": "hidden states", "fast-kvzip": "hidden states", "dms": "hidden states",
    "criticalkv": "output projection", "critical-adakv": "output projection", "rest-kv": "output projection",
    "fastv": "tokens are of images", "text-first": "tokens are of images",
    "lazy-eviction": "2 numbers per slot",
    "raas": "whole prompt", "rpc": "whole prompt", "random-attention": "whole prompt", "triattention": "whole prompt",
    "reasoning": "whole prompt",
}  # fmt: skip
CALIBRATED = {  # the kind that each needs
    "keepkv3": "gates", "q-filter": "q-filters", "headkv": "heads", "surface-logic-kv": "heads",
    "duo-attention": "heads", "lukv": "heads",
}  # fmt: skip
