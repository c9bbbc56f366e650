"""SFT and DPO with TRL. Imports no document, no generation, no ZenML."""
