"""Operations that are differentiable twice anywhere: in the engine, under ``create_graph=True``, in ``torch.func``."""

from mamlfast.ops.attention import attention as attention
from mamlfast.ops.attention import attention_backend as attention_backend
from mamlfast.ops.attention import attention_reference as attention_reference
from mamlfast.ops.attention import attention_rule as attention_rule
from mamlfast.ops.attention_first_order import use_first_order_attention as use_first_order_attention
from mamlfast.ops.backend import use_backend as use_backend
from mamlfast.ops.cross_entropy import cross_entropy as cross_entropy
from mamlfast.ops.cross_entropy import cross_entropy_reference as cross_entropy_reference
from mamlfast.ops.elementwise import gelu as gelu
from mamlfast.ops.elementwise import gelu_tanh as gelu_tanh
from mamlfast.ops.elementwise import silu as silu
from mamlfast.ops.layer_norm import layer_norm as layer_norm
from mamlfast.ops.layer_norm import layer_norm_reference as layer_norm_reference
from mamlfast.ops.linear import linear as linear
from mamlfast.ops.linear import linear_reference as linear_reference
from mamlfast.ops.matrix_products import matrix_library as matrix_library
from mamlfast.ops.matrix_products import use_matrix_products as use_matrix_products
from mamlfast.ops.rms_norm import rms_norm as rms_norm
from mamlfast.ops.rms_norm import rms_norm_reference as rms_norm_reference
from mamlfast.ops.rule import Rule as Rule
from mamlfast.ops.rule import derived_rule as derived_rule
from mamlfast.ops.softmax import log_softmax as log_softmax
from mamlfast.ops.softmax import softmax as softmax
