"""The image-edit call of the OpenAI API, as its clients speak it: /v1/images/edits."""
