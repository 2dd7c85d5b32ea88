"""Entry points: the job spec's file (`spec_file`), the command line (`cli`), the demo (`demo`)."""
