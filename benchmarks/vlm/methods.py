"""What is compared: EffiVLM-Bench's methods as they are here, forms that keep text, and reducers."""

METHODS = (
    "random", "ends", "h2o", "snapkv", "pyramidkv", "look-m:text_first=true",
    "look-m:text_first=true,within=modality", "vl-cache", "vl-cache:adaptive=0.2", "text-first", "text-first:score=h2o",
    "keepkv2", "visionzip", "prumerge-plus",
)  # fmt: skip
BUDGETS = (0.2, 0.4)
