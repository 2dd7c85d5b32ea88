"""Tests of the pipeline and its entry points. `builders` makes small inputs, `s3_server` runs a real object store."""
