"""One folder per workflow; see `trainbook.catalog.CONTRACT` for what each offers."""
