"""The decoder-only transformer as Flax NNX modules: what one layer of tokens becomes.

One attention, one MLP and one block serve every family; `TransformerConfig` says which of
their parts are there. Modules hold parameters and nothing else: caches come in and go out
as values, and `Network` binds modules, caches and parameters into pure functions.

Letters: D embed_dim, V vocab_size, F mlp_dim, H head_dim; kv_heads * group query heads.
Matrices that read the same input are stored as one, so that a decode step reads them in one
product: query, key and value as `[D, kv_heads, group + 2, H]`, gate and up as `[D, 2, F]`.
Every parameter carries the logical names of its axes (see `iro_jax.models.sharding`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from iro_jax.models import rope as rope_lib
from iro_jax.models.attention import Part, attend
from iro_jax.models.config import Activation, Layer, TransformerConfig
from iro_jax.models.lora import Adapter, Target
from iro_jax.models.sharding import automatic_mesh, spread_batch, whole_rows

AttendFn = Callable[[Array, Sequence[Part], float | None], Array]

_ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    # Drawn flat: XLA on CPU compiles threefry ten times slower for four-dimensional shapes.
    flat = jax.random.normal(rngs.params(), (math.prod(shape),))
    return nnx.Param(0.02 * flat.reshape(shape), axes=axes)


def _constant(value: float, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)


class Projection(nnx.Module):
    """A linear map from the last `len(inputs)` axes to `outputs`, computed as one product."""

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        axes: tuple[str | None, ...],
        *,
        bias: bool,
        rngs: nnx.Rngs,
    ):
        self.inputs, self.outputs = inputs, outputs
        self.kernel = _normal(rngs, (*inputs, *outputs), axes)
        self.bias = _constant(0.0, outputs, axes[len(inputs) :]) if bias else None

    def __call__(self, x: Array, adapter: Adapter | None = None) -> Array:
        batch = x.shape[: x.ndim - len(self.inputs)]
        rows = x.reshape(math.prod(batch), math.prod(self.inputs))
        kernel = self.kernel.get_value()
        from kernels import Coded, matmul, matmul_coded  # with Pallas, a third of a second

        if isinstance(kernel, Coded):
            y = matmul_coded(rows, kernel).reshape(*batch, *self.outputs)
        elif automatic_mesh() is None:
            kernel = kernel.astype(x.dtype).reshape(rows.shape[-1], math.prod(self.outputs))
            y = matmul(rows, kernel).reshape(*batch, *self.outputs)
        else:
            # A reshape that hides by which axis a kernel is split would have all of it gathered.
            y = jnp.tensordot(x, kernel.astype(x.dtype), len(self.inputs))
        if adapter is not None:
            y += adapter.change(rows).reshape(y.shape)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over the last axis, in f32."""

    def __init__(self, config: TransformerConfig, size: int, *, kind: str | None = None):
        self.kind = kind or config.norm
        self.epsilon = config.norm_epsilon
        self.offset = 1.0 if config.norm_plus_one else 0.0
        self.scale = _constant(1.0 - self.offset, (size,), (None,))
        self.bias = _constant(0.0, (size,), (None,)) if self.kind == "layer" else None

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        if self.kind == "layer":
            y -= jnp.mean(y, axis=-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        y *= self.scale[...].astype(jnp.float32) + self.offset
        if self.bias is not None:
            y += self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention over the parts of a cache."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        kv_heads, group, head_dim = config.num_kv_heads, config.group_size, config.head_dim
        self.config = config
        self.qkv = Projection(
            (config.embed_dim,),
            (kv_heads, group + 2, head_dim),
            ("embed", "kv_heads", None, None),
            bias=config.qkv_bias,
            rngs=rngs,
        )
        self.output = Projection(
            (kv_heads, group, head_dim),
            (config.embed_dim,),
            ("kv_heads", None, None, "embed"),
            bias=config.output_bias,
            rngs=rngs,
        )
        self.query_norm = Norm(config, head_dim, kind="rms") if config.qk_norm else None
        self.key_norm = Norm(config, head_dim, kind="rms") if config.qk_norm else None

    def project(
        self,
        x: Float[Array, "*batch length D"],
        rope_tables: tuple[Array, Array],
        adapter: Adapter | None = None,
    ) -> tuple[Array, Array, Array]:
        """Queries `[*batch, length, kv_heads, group, H]`, keys and values in cache order."""
        projected = self.qkv(x, adapter)
        if self.query_norm is not None and self.key_norm is not None:
            group = self.config.group_size
            queries, keys, values = jnp.split(projected, (group, group + 1), axis=-2)
            normed = [self.query_norm(queries), self.key_norm(keys), values]
            projected = jnp.concatenate(normed, axis=-2)
        return rope_lib.rotate_heads(projected, *rope_tables, scale=self.config.query_scale)


class Mlp(nnx.Module):
    """`down(activation(gate(x)) * up(x))`, or `down(activation(up(x)))` when not gated."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.activation: Activation = config.activation
        branches = 2 if config.gated_mlp else 1
        self.up = Projection(
            (config.embed_dim,),
            (branches, config.mlp_dim),
            ("embed", None, "mlp"),
            bias=config.mlp_bias,
            rngs=rngs,
        )
        self.down = Projection(
            (config.mlp_dim,),
            (config.embed_dim,),
            ("mlp", "embed"),
            bias=config.mlp_bias,
            rngs=rngs,
        )

    def __call__(self, x: Array, up: Adapter | None = None, down: Adapter | None = None) -> Array:
        branches = self.up(x, up)
        hidden = _ACTIVATIONS[self.activation](branches[..., 0, :])
        if branches.shape[-2] == 2:
            hidden *= branches[..., 1, :]
        return self.down(hidden, down)


class Block(nnx.Module):
    """Attention and MLP with their norms; sequential, sandwiched or parallel."""

    def __init__(self, config: TransformerConfig, layer: Layer, *, rngs: nnx.Rngs):
        self.layer = layer
        self.parallel = config.parallel_residual
        self.attention = Attention(config, rngs=rngs)
        self.mlp = Mlp(config, rngs=rngs)
        self.attention_norm = Norm(config, config.embed_dim)
        self.mlp_norm = Norm(config, config.embed_dim)
        post = config.post_norms
        self.attention_post_norm = Norm(config, config.embed_dim) if post else None
        self.mlp_post_norm = Norm(config, config.embed_dim) if post else None

    def __call__(
        self,
        x: Array,
        rope_tables: tuple[Array, Array],
        remember,
        adapters: Mapping[Target, Adapter],
        attend: AttendFn = attend,
        choose: Callable[[Array], Array] | None = None,
    ) -> Array:
        """One layer.

        Args:
          x: residual stream, `[*batch, length, D]`.
          rope_tables: cosines and sines of this layer's rotary embedding.
          remember: `(keys, values) -> parts` stores the new tokens' keys and values and
            returns every part that the queries attend to.
          adapters: of this layer's projections, where they have one.
          attend: from queries, parts and the soft cap to what is attended to.
          choose: takes the tokens, along `length`, that go on; of the others there are keys and
            values.
        """
        queries, keys, values = self._before_attention(x, rope_tables, adapters.get("qkv"))
        parts = remember(keys, values)
        if choose is not None:
            x, queries = choose(x), choose(queries)
        attended = attend(queries, parts, self.attention.config.attention_softcap)
        return self._after_attention(x, attended, adapters)

    @jax.jit
    def _before_attention(
        self, x: Array, rope_tables: tuple[Array, Array], adapter: Adapter | None
    ) -> tuple[Array, Array, Array]:
        """Queries, keys and values; traced and lowered once for all layers alike."""
        return self.attention.project(self.attention_norm(x), rope_tables, adapter)

    @jax.jit
    def _after_attention(
        self, x: Array, attended: Array, adapters: Mapping[Target, Adapter]
    ) -> Array:
        """The residual stream behind the layer; traced and lowered once, too."""
        attended = self.attention.output(attended.astype(x.dtype), adapters.get("output"))
        if self.attention_post_norm is not None:
            attended = self.attention_post_norm(attended)
        mlp = functools.partial(self.mlp, up=adapters.get("up"), down=adapters.get("down"))
        if self.parallel:
            return x + attended + mlp(self.mlp_norm(x))
        x = x + attended
        transformed = mlp(self.mlp_norm(x))
        if self.mlp_post_norm is not None:
            transformed = self.mlp_post_norm(transformed)
        return x + transformed


class Transformer(nnx.Module):
    """Embedding, blocks, final norm, and the head that the configuration asks for."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        vocabulary = (config.vocab_size, config.embed_dim)
        self.embedding = _normal(rngs, vocabulary, ("vocab", "embed"))
        self.layers = nnx.List([Block(config, layer, rngs=rngs) for layer in config.layers])
        self.final_norm = Norm(config, config.embed_dim)
        scores = config.head == "score"
        untied = not scores and not config.tied_embeddings
        self.unembedding = _normal(rngs, vocabulary, ("vocab", "embed")) if untied else None
        self.score_head = _normal(rngs, (1, config.embed_dim), (None, None)) if scores else None

    def embed(self, tokens: Int[Array, "*batch length"]) -> Float[Array, "*batch length D"]:
        dtype = jnp.dtype(self.config.dtype)
        x = self._rows(tokens).astype(dtype)
        if self.config.scale_embeddings:
            x *= jnp.asarray(math.sqrt(self.config.embed_dim), dtype)
        return spread_batch(x)

    def _rows(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch D"]:
        from kernels import Coded

        table = self.embedding.get_value()
        return table.outputs(tokens) if isinstance(table, Coded) else whole_rows(table)[tokens]

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Logits over the vocabulary, f32, from final hidden states."""
        if self.score_head is not None:
            raise ValueError("This network has no language-model head. Got: config.head='score'")
        table = self.embedding if self.unembedding is None else self.unembedding
        weights = table.get_value()
        from kernels import Coded, matmul_coded, matmul_transposed

        coded = isinstance(weights, Coded)
        if coded or (automatic_mesh() is None and hidden.dtype == jnp.float32):
            rows = hidden.reshape(-1, hidden.shape[-1]).astype(jnp.float32)
            product = matmul_coded if coded else matmul_transposed
            logits = product(rows, weights if coded else weights.astype(jnp.float32))
            logits = logits.reshape(*hidden.shape[:-1], self.config.vocab_size)
        else:
            weights = weights.astype(hidden.dtype)
            logits = jnp.einsum(
                "...d,vd->...v", hidden, weights, preferred_element_type=jnp.float32
            )
        cap = self.config.logit_softcap
        if cap is not None:
            logits = cap * jnp.tanh(logits / cap)
        return spread_batch(logits)

    def score(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
        """The scalar head's value, f32, from final hidden states."""
        if self.score_head is None:
            raise ValueError("This network has no score head. Got: config.head='logits'")
        weights = self.score_head[...][0].astype(jnp.float32)
        return jnp.einsum("...d,d->...", hidden.astype(jnp.float32), weights)
