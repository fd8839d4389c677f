"""Class gradients, their Grams and conflict, for any losses_fn(params, batch) -> [N].

It is a library of its own. It does not know configs, runs or the models of this project.
"""

from csba_jax.gradients.batch_estimate import batch_conflict as batch_conflict
from csba_jax.gradients.conflict import Conflict as Conflict
from csba_jax.gradients.conflict import conflict_matrix as conflict_matrix
from csba_jax.gradients.estimate import estimated_conflict as estimated_conflict
from csba_jax.gradients.estimate import exact_conflict as exact_conflict
from csba_jax.gradients.gram import ClassGrams as ClassGrams
from csba_jax.gradients.per_class import class_gradients as class_gradients
from csba_jax.gradients.per_class import class_grams as class_grams
