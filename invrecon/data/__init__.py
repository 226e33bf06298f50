"""Readers, cases, phantoms and LightningDataModules.

Importing this package is light; readers import h5py, nibabel, pydicom and nrrd only when a file asks for it.
"""

from invrecon.data.cases import Case, CaseBatch, collate_cases
from invrecon.data.intensity import Intensity

__all__ = ["Case", "CaseBatch", "Intensity", "collate_cases"]
