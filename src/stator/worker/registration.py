"""The record that makes a model appear at frontends."""

import msgspec

from stator.llm.card import ModelCard, card_to_json
from stator.protocol.ids import EndpointId
from stator.protocol.records import ModelRecord
from stator.worker.engine import EngineConfig

__all__ = ["model_record", "served_card"]


def served_card(config: EngineConfig, *, served_name: str = "") -> ModelCard:
    """The engine's card with the name it is served by and its limits (`spec/45 §2`).

    The name is `served_name`, else the engine's, else the card's.
    """
    card = config.card
    runtime = card.runtime_config
    limits = {
        name: value
        for name in ("context_length", "total_kv_blocks", "max_num_seqs", "max_num_batched_tokens", "runtime_data")
        if (value := getattr(config, name)) is not None
    }
    name = served_name or config.served_name or card.display_name
    return msgspec.structs.replace(
        card,
        display_name=name,
        slug=card.slug if name == card.display_name else "",
        kv_cache_block_size=config.kv_cache_block_size or card.kv_cache_block_size,
        runtime_config=msgspec.structs.replace(
            runtime,
            data_parallel_start_rank=config.data_parallel_start_rank,
            data_parallel_size=config.data_parallel_size,
            enable_local_indexer=False,  # nobody here answers queries about the cache
            **limits,
        ),
    )


def model_record(config: EngineConfig, *, endpoint: EndpointId, instance_id: int, served_name: str = "") -> ModelRecord:
    """The model record of one instance of `endpoint`."""
    return ModelRecord(
        namespace=endpoint.namespace,
        component=endpoint.component,
        endpoint=endpoint.name,
        instance_id=instance_id,
        card_json=card_to_json(served_card(config, served_name=served_name)),
    )
