"""What stands in a text for a picture; it knows nothing of models, so that tasks can be read without them."""

MARK = "\N{OBJECT REPLACEMENT CHARACTER}"  # in a text: one step of what is seen
