"""The editing API: /v1/images, /v1/segment, /v1/erase, /v1/replace, /v1/jobs."""
