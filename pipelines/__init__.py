"""Definition and control of the two pipelines from a workstation or CI; never imported inside a job."""
