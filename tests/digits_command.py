"""The kit's command line with the digits classifier as its one workflow."""

import os
import sys
from pathlib import Path

import trainbook.report
import trainbook.run
from tests import digits_classifier
from trainbook import catalog
from trainbook.__main__ import main

catalog.names = lambda: ["digits_classifier"]
catalog.load = trainbook.run.load = trainbook.report.load = lambda name: catalog.Workflow(name, digits_classifier)
catalog.Workflow.notebook = property(lambda self: Path(os.environ["TEST_NOTEBOOKS"]) / f"{self.name}.ipynb")

if __name__ == "__main__":
    sys.exit(main())
