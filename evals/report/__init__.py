"""From the results of recipes to plots and one page that says which setting to pick."""

from headq_ao.evals.report.write import write_report
