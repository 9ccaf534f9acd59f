"""From a plan to tokens: what a step needs on the device, the launch, and the results when they arrive.

Nothing here waits for the device but `InFlight.wait`.

Shape suffixes: T tokens of a step, P scored ones, B sequences, R rows of device state or of P, E hidden size, V vocab.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.runtime.graphs import Capture, ChunkGraphs, ChunkInputs, DecodeGraphs, SampledLogits
from quantkit.runtime.logprobs import Logprobs, TokenLogprobs, logprobs_of
from quantkit.runtime.masks import Masks
from quantkit.runtime.model import Model
from quantkit.runtime.packed import send
from quantkit.runtime.row_state import RowState
from quantkit.runtime.sampler import NewRow, Sampled, Sampler
from quantkit.runtime.step import Step
from quantkit.runtime.step_plan import Scheduled, StepPlan
from quantkit_kernels.paged_kv import BLOCK_SIZE, Pages


class Results(NamedTuple):
    """Of a step, for each row that samples, in the order of the plan. is_nan: the token means nothing.

    prompt_logprobs: of every scored token of all rows.
    """

    token_ids: list[int]
    is_nan: list[bool]
    logprobs: list[TokenLogprobs] | None
    prompt_logprobs: list[TokenLogprobs] | None


class InFlight:
    """The results of a launched step, on their way to the host."""

    def __init__(self, sampled: Sampled, prompt_logprobs: Logprobs | None) -> None:
        self._sampled = sampled
        self._prompt_logprobs = prompt_logprobs
        self._done: torch.cuda.Event | None = None
        if sampled.token_ids_B.is_cuda:
            token_ids_B, is_nan_B = _to_pinned(sampled.token_ids_B), _to_pinned(sampled.is_nan_B)
            self._sampled = Sampled(token_ids_B, is_nan_B, _all_to_pinned(sampled.logprobs))
            self._prompt_logprobs = _all_to_pinned(prompt_logprobs)
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    def wait(self) -> Results:
        """Block until the device has got there."""
        if self._done is not None:
            self._done.synchronize()
        token_ids_B, is_nan_B, logprobs = self._sampled
        each = [None if of is None else of.of_tokens() for of in (logprobs, self._prompt_logprobs)]
        return Results(token_ids_B.tolist(), is_nan_B.tolist(), *each)


def _to_pinned(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _all_to_pinned(logprobs: Logprobs | None) -> Logprobs | None:
    return None if logprobs is None else Logprobs(*map(_to_pinned, logprobs))


class Runner:
    """Owns the device: the model, the KV pool, the state of rows, the graphs.

    capture: how to make graphs of steps; None: none are made.
    """

    def __init__(
        self, model: Model, *, num_blocks: int, num_rows: int, max_model_len: int, capture: Capture | None
    ) -> None:
        device = model.target.device
        self._decoder = model.decoder
        self._pools = model.kv.create_pools(num_blocks, device)
        self._rows = RowState(num_rows, -(-max_model_len // BLOCK_SIZE), device)
        self._sampler = Sampler(num_rows + 1, model.spec.vocab_size, device)
        self._device = device
        self._offsets = torch.arange(num_rows + 1, dtype=torch.int32, device=device)
        none = torch.zeros(0, dtype=torch.int64, device=device)  # there, so that the host waits for the step
        self._nothing = Sampled(none, none.bool(), None)
        self.is_async = device.type == "cuda"  # `launch` returns before the device is done
        self._decode_graphs: DecodeGraphs | None = None
        self._chunk_graphs: ChunkGraphs | None = None
        if capture is not None:
            sizes = {"padding_row": num_rows, "max_model_len": max_model_len}
            self._decode_graphs = DecodeGraphs(self._decode_logits, capture, **sizes, device=device)
            self._chunk_graphs = ChunkGraphs(self._chunk_logits, capture, **sizes, device=device)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile what single users need, and capture their graphs."""
        with self._on_device():
            self._warm_up()

    def _warm_up(self) -> None:
        if self._decode_graphs is not None and self._chunk_graphs is not None:
            self._chunk_graphs.capture_small()
            self._decode_graphs.capture_small()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> InFlight:
        """Start a step; on a GPU, returns at once."""
        with self._on_device():
            return self._launch(plan)

    def _on_device(self) -> AbstractContextManager[None]:
        """Events, streams and captures are those of the current GPU."""
        return torch.cuda.device(self._device) if self.is_async else nullcontext()

    def _launch(self, plan: StepPlan) -> InFlight:
        self._sampler.assign([_new_row(item) for item in self._rows.claim(plan.rows)])
        self._rows.update(plan.rows)
        rows, lengths = _sampling(plan.rows)
        parts, prompt_logprobs = self._logits(plan)
        if not rows:
            return InFlight(self._nothing, prompt_logprobs)
        logits_BV, row_B, length_B = (
            torch.cat(each) if len(parts) > 1 else each[0] for each in zip(*parts, strict=True)
        )
        row_B = row_B.long()
        work = self._sampler.work(rows, lengths)
        masks = Masks.of([sequence.mask for sequence in plan.sampling()], self._device)
        sampled = self._sampler.sample(logits_BV, row_B, length_B.long(), work, masks)
        self._rows.last_token_R.index_copy_(0, row_B, sampled.token_ids_B)
        return InFlight(sampled, prompt_logprobs)

    def _logits(self, plan: StepPlan) -> tuple[list[SampledLogits], Logprobs | None]:
        """Of the sequences that sample, in the order of the plan: from a graph of each kind, or from one eager step.

        Two graphs read the weights twice, which takes less time than the launches that they save. Graphs keep no hidden
        states, so a step that scores is eager. Returns with them the log probabilities of what is scored.
        """
        single, chunks = plan.rows[: plan.num_decode], plan.rows[plan.num_decode :]
        decode, chunk = self._decode_graphs, self._chunk_graphs
        num_tokens = sum(item.num_new for item in chunks)
        if decode is None or chunk is None or not decode.takes(len(single)):
            return self._eager(single, chunks)
        if not chunk.takes(num_tokens, len(chunks)) or any(item.scored for item in plan.rows):
            return self._eager(single, chunks)
        if not chunks:
            return [decode.run(*_sampling(single))], None
        ended = chunk.run(_chunk_parts(chunks))
        if not single:
            return [ended], None
        kept = ended._replace(logits_BV=ended.logits_BV.clone())  # the next graph may compute in their memory
        return [decode.run(*_sampling(single)), kept], None

    def _eager(
        self, single: Sequence[Scheduled], chunks: Sequence[Scheduled]
    ) -> tuple[list[SampledLogits], Logprobs | None]:
        """Any step, outside of graphs."""
        sent = send((*_sampling(single), *_chunk_parts(chunks)), self._device)
        row_B, length_B, inputs = sent[0], sent[1], ChunkInputs(*sent[2:])
        steps = []
        if single:
            steps.append(self._decode_step(row_B, length_B, _longest(single)))
        if chunks:
            steps.append(self._chunk_step(inputs, max(item.num_new for item in chunks), _longest(chunks)))
        hidden_TE = self._decoder(_joined(steps), self._pools)
        prompt_logprobs = self._prompt_logprobs(hidden_TE, [*single, *chunks])
        last_S = torch.cat((self._offsets[: len(single)], inputs.last_S + len(single)))
        sampled = SampledLogits(
            self._decoder.logits(hidden_TE[last_S]) if len(last_S) else hidden_TE,
            torch.cat((row_B, inputs.row_S)),
            torch.cat((length_B, inputs.length_S)),
        )
        return [sampled], prompt_logprobs

    def _prompt_logprobs(self, hidden_TE: Tensor, rows: Sequence[Scheduled]) -> Logprobs | None:
        """Of what is scored, as many logits at a time as a step may sample from: memory is planned for these."""
        places: list[int] = []
        targets: list[int] = []
        first = 0
        for item in rows:
            places += (first + token - item.start for token in item.scored)
            targets += item.sequence.targets[item.scored.start : item.scored.stop]
            first += item.num_new
        if not places:
            return None
        num_likeliest = max(item.sequence.params.prompt_logprobs or 0 for item in rows)
        most = self._rows.padding_row
        sent = [torch.split(part.long(), most) for part in send((places, targets), self._device)]
        parts = [
            logprobs_of(self._decoder.logits(hidden_TE[place_R]), target_R, num_likeliest)
            for place_R, target_R in zip(*sent, strict=True)
        ]
        return Logprobs(*(torch.cat(each) for each in zip(*parts, strict=True)))

    def _decode_logits(self, row_B: Tensor, length_B: Tensor, max_context: int) -> Tensor:
        """A decode step for any lengths up to max_context: what a graph holds."""
        step = self._decode_step(row_B, length_B, max_context)
        logits_BV: Tensor = self._decoder.logits(self._decoder(step, self._pools))
        return logits_BV

    def _chunk_logits(self, inputs: ChunkInputs, max_context: int) -> Tensor:
        """A step of chunks for any lengths up to max_context: what a graph holds."""
        step = self._chunk_step(inputs, len(inputs.token_ids_T), max_context)
        logits_SV: Tensor = self._decoder.logits(self._decoder(step, self._pools)[inputs.last_S])
        return logits_SV

    def _decode_step(self, row_B: Tensor, length_B: Tensor, max_context: int) -> Step:
        """One new token each, the last token of the row; nothing is read by the host."""
        position_B = (length_B - 1).long()
        table_BL = self._rows.block_table_RL.index_select(0, row_B)
        block_B = table_BL.gather(1, (position_B // BLOCK_SIZE)[:, None])[:, 0]
        slot_B = block_B * BLOCK_SIZE + position_B % BLOCK_SIZE
        return Step(
            token_ids_T=self._rows.last_token_R.index_select(0, row_B),
            positions_T=position_B,
            slots_T=slot_B.masked_fill(row_B == self._rows.padding_row, -1),
            decode=Pages(table_BL, length_B, self._offsets[: len(row_B) + 1], 1, max_context),
            prefill=None,
            num_decode_tokens=len(row_B),
        )

    def _chunk_step(self, inputs: ChunkInputs, max_q_len: int, max_context: int) -> Step:
        """Chunks of prompts. The two limits size the launch of attention."""
        table_CL = self._rows.block_table_RL.index_select(0, inputs.row_C)
        return Step(
            token_ids_T=inputs.token_ids_T.long(),
            positions_T=inputs.positions_T.long(),
            slots_T=inputs.slots_T.long(),
            decode=None,
            prefill=Pages(table_CL, inputs.length_C, inputs.offsets, max_q_len, max_context),
            num_decode_tokens=0,
        )


def _new_row(item: Scheduled) -> NewRow:
    sequence = item.sequence
    answer_ids = sequence.token_ids[len(sequence.prompt_ids) :]
    return NewRow(item.row, sequence.params, sequence.prompt_ids, answer_ids, sequence.stop_ids)


def _sampling(rows: Sequence[Scheduled]) -> tuple[list[int], list[int]]:
    """Rows that sample, and the lengths of their sequences: the places of the tokens to come."""
    sampling = [item for item in rows if item.samples]
    return [item.row for item in sampling], [item.start + item.num_new for item in sampling]


def _chunk_parts(chunks: Sequence[Scheduled]) -> list[list[int]]:
    """What `ChunkInputs` holds, without padding."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    for item in chunks:
        new = range(item.start, item.start + item.num_new)
        token_ids += item.sequence.token_ids[new.start : new.stop]
        positions += new
        slots += _slots(item.sequence.blocks, new)
    lengths = [item.start + item.num_new for item in chunks]
    ends = list(accumulate(item.num_new for item in chunks))
    last = [end - 1 for end, item in zip(ends, chunks, strict=True) if item.samples]
    rows = [item.row for item in chunks]
    return [token_ids, positions, slots, rows, lengths, [0, *ends], last, *_sampling(chunks)]


def _slots(blocks: Sequence[int], new: range) -> list[int]:
    """Where the keys and values of tokens go."""
    first = new.start // BLOCK_SIZE * BLOCK_SIZE
    touched = blocks[first // BLOCK_SIZE : -(-new.stop // BLOCK_SIZE)]
    slots = [slot for block in touched for slot in range(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)]
    return slots[new.start - first : new.stop - first]


def _joined(steps: Sequence[Step]) -> Step:
    """One step of the single tokens and the chunks, or of what there is."""
    if len(steps) == 1:
        return steps[0]
    single, chunks = steps
    return Step(
        token_ids_T=torch.cat((single.token_ids_T, chunks.token_ids_T)),
        positions_T=torch.cat((single.positions_T, chunks.positions_T)),
        slots_T=torch.cat((single.slots_T, chunks.slots_T)),
        decode=single.decode,
        prefill=chunks.prefill,
        num_decode_tokens=single.num_decode_tokens,
    )


def _longest(rows: Sequence[Scheduled]) -> int:
    return max(item.start + item.num_new for item in rows)
