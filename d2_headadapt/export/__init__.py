"""Models leave detectron2 as TorchScript or ONNX: verified against eager, with their class names in the file."""

from .entry import Export as Export
from .entry import export_lines as export_lines
from .entry import export_model as export_model
from .entry import export_predictor as export_predictor
from .formats import ENDINGS as ENDINGS
from .formats import OPSET as OPSET
from .formats import ExportedModel as ExportedModel
from .parity import TOLERANCE as TOLERANCE
from .parity import Parity as Parity
from .tables import ENTRY as ENTRY
from .tables import embed_tables as embed_tables
from .tables import read_facts as read_facts
from .tables import read_tables as read_tables
from .tables import write_bytes as write_bytes
