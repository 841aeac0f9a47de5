"""Text from a model: a prompt, continued token by token.

Keys and values of earlier tokens are kept where the model allows it. With gated delta nets, sinks or rounded rotary
positions every token runs the whole window again. `python pack_artifact.py sample` is the command.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece as spm
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import caseops  # noqa: E402
import pair_fusion  # noqa: E402

import train_gpt  # noqa: E402
from train_gpt import BOS_ID, Config, UserError  # noqa: E402

COLDEST = 1e-6  # a temperature below: the likeliest token; logits over it would not stay finite
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a piece of a character decodes to


class Choice(NamedTuple):
    """How a token is drawn."""

    temperature: float  # 0: the likeliest token
    top_p: float  # draw from the likeliest tokens that together have this probability
    seed: int


class Continuation:
    """A model with the tokens that it has read so far."""

    def __init__(self, model: train_gpt.GPT, cfg: Config) -> None:
        self.model, self.window = model, cfg.eval_seq_len
        self.groups = cfg.num_heads // cfg.num_kv_heads
        self.ids: list[int] = []
        self.keeps = "G" not in train_gpt.mixer_letters(cfg) and not model.anchored
        device = model.tok_emb.weight.device
        shape = (len(model.route.layers), 2, 1, 0, cfg.num_kv_heads, cfg.model_dim // cfg.num_heads)
        self.cache = torch.zeros(shape, dtype=model.dtype, device=device)

    @torch.no_grad()
    def read(self, new: list[int]) -> Tensor:
        """Logits (1, V), before the softcap, of the token after all that was read and `new`."""
        old, device = len(self.ids), self.cache.device
        self.ids += new
        if self.keeps:
            h = self.read_on(torch.tensor(new, device=device), old)
        else:
            ids = torch.tensor([self.ids[-self.window :]], device=device)
            h = self.model.trunk(ids, self.model.plan(ids.size(1), device, max_len=self.window))
        return self.model.logits(h[:, -1])

    def read_on(self, new: Tensor, old: int) -> Tensor:
        """Hidden states (1, T, D) of T new tokens over the kept keys and values of `old` earlier ones."""
        length, kept, reach = len(new), self.cache.size(3), self.model.reach
        # what embeddings look back at; before the first token there is only padding, which `first` hides
        before = ([BOS_ID] * reach + self.ids[:old])[old : old + reach]
        own = torch.ones(length, length, dtype=torch.bool, device=new.device).tril()
        seen = torch.cat((own.new_ones(length, kept), own), dim=1)
        # each key/value head serves a group of query heads, whose queries lie side by side
        mask = torch.zeros_like(seen, dtype=self.model.dtype).masked_fill(~seen, -torch.inf).repeat(self.groups, 1)
        cache = train_gpt.KVCache(
            first=torch.full((1, 1, 1), old == 0, device=new.device),
            positions=old + torch.arange(length, device=new.device)[None],
            cached=self.cache,
            mask=mask[None, None],
            new=[],
        )
        meta = self.model.plan(length, new.device, max_len=self.window, kv_cache=cache)
        ids = torch.cat((new.new_tensor(before), new))[None]
        h = self.model.trunk(ids, meta)
        self.cache = torch.cat((self.cache, torch.stack(cache.new)), dim=3)[:, :, :, -self.window :]
        return h


def draw(logits: Tensor, choice: Choice, generator: torch.Generator) -> int:
    """A token id from logits (V,)."""
    if choice.temperature < COLDEST:
        return int(logits.argmax())
    probabilities, ids = torch.softmax(logits.double() / choice.temperature, 0).sort(descending=True, stable=True)
    # likelier tokens have less than top_p together; the likeliest always stays
    kept = probabilities.cumsum(0) - probabilities < choice.top_p
    kept[0] = True
    return int(ids[torch.multinomial(probabilities * kept, 1, generator=generator)])


def continued(model: train_gpt.GPT, cfg: Config, prompt: list[int], count: int, choice: Choice) -> Iterator[int]:
    """Yield up to `count` ids after the prompt, which begins with BOS; the last one is BOS if the document ends."""
    reader, generator = Continuation(model, cfg), torch.Generator().manual_seed(choice.seed)
    new = prompt
    for _ in range(count):
        # as in scoring: pairs that the tokenizer never writes lose almost all of their probability
        banned = None if model.canonical is None else model.canonical[new[-1:]]
        logits = train_gpt.softcapped(reader.read(new), model.softcap, banned)[0]
        new = [draw(logits.cpu(), choice, generator)]
        yield from new
        if new == [BOS_ID]:
            return


def is_fused(data: Path) -> bool:
    """Whether the manifest of prepared data says that a space and a case operator are one id."""
    return pair_fusion.FUSED_PAIRS in train_gpt.read_json(data / "manifest.json")


class Script:
    """Ids to text and back, through case operators and fused pairs if the tokenizer has them."""

    def __init__(self, tokenizer: bytes, fused: bool) -> None:
        self.processor = spm.SentencePieceProcessor(model_proto=tokenizer)
        self.case = self.processor.piece_to_id(train_gpt.CASE_OPERATOR) != self.processor.unk_id()
        # an alias is the id of a byte that no text has: whoever draws one means the pair
        self.fusion = pair_fusion.fusion_of(self.processor) if self.case and fused else None

    def encode(self, text: str) -> list[int]:
        """The ids of the beginning of a document."""
        ids = np.array(self.processor.encode(caseops.encode(text) if self.case else text), dtype=np.int64)
        if self.fusion is not None and len(ids):
            ids, _ = self.fusion.fuse(ids)
        return [BOS_ID, *ids.tolist()]

    def decode(self, ids: list[int]) -> str:
        """The text of ids, with case operators as they are."""
        if self.fusion is not None and ids:
            ids = self.fusion.unfuse(np.array(ids, dtype=np.int64))[0].tolist()
        return self.processor.decode(ids)


class Printer:
    """Turns a growing list of ids into text, a part at a time."""

    def __init__(self, script: Script, prompt: list[int]) -> None:
        self.script, self.ids = script, prompt[1:]
        self.decoder = caseops.Decoder()
        # operators where no text can have them
        self.impossible = 0
        before = script.decode(self.ids)
        self.shown = len(before)
        # the prompt may end inside a word of capitals
        self.in_case(before)

    def push(self, token: int) -> str:
        """What one more id adds to the text: nothing while a character or a case operator is incomplete."""
        self.ids.append(token)
        text = self.script.decode(self.ids)
        if text.endswith(INCOMPLETE):
            return ""
        new, self.shown = text[self.shown :], len(text)
        return self.in_case(new) if self.script.case else new

    def in_case(self, text: str) -> str:
        """Text with its case operators carried out."""
        for part in filter(None, caseops.OPERATOR.split(text)):
            try:
                if self.decoder.escape:
                    self.decoder.read_literal(part[0])
                    part = part[1:]
                if part in caseops.OPERATORS:
                    self.decoder.read_operator(part, 0)
                elif part:
                    self.decoder.read_text(part, 0)
            except caseops.CaseOpsError:
                # a model may write what no text is encoded as: the operator is left out
                self.impossible += 1
                out, self.decoder = self.decoder.out, caseops.Decoder()
                self.decoder.out = out if part in caseops.OPERATORS else [*out, part]
        ready = "".join(self.decoder.out)
        self.decoder.out.clear()
        return ready


def load_model(weights: Path, cfg: Config) -> train_gpt.GPT:
    """The model of a model.bin, ready to be read from, on the device of DEVICE. UserError as train_gpt."""
    runtime = train_gpt.Runtime.start(cfg, {})
    model = train_gpt.GPT(cfg, dtype=runtime.dtype)
    train_gpt.fill_model(model, train_gpt.load_artifact(weights, cfg), str(weights))
    model.to(runtime.device).eval().set_looping(train_gpt.loops(cfg))
    return model


def stream(model: train_gpt.GPT, cfg: Config, script: Script, prompt: str, count: int, choice: Choice) -> Iterator[str]:
    """Yield a prompt, the text after it as it is drawn, and notes on impossible operators and unread pairs."""
    ids = script.encode(prompt)
    if len(ids) >= cfg.eval_seq_len:
        raise UserError(f"the prompt has {len(ids)} tokens, and EVAL_SEQ_LEN={cfg.eval_seq_len}; give a shorter one")
    if train_gpt.MASKED_WHEN[cfg.canonical_mask]:
        model.canonical = torch.from_numpy(train_gpt.canonical_mask(script.processor)).to(model.tok_emb.weight.device)
    # no text has these bytes: without a manifest, nothing else says that they stand for pairs
    unexplained = {*pair_fusion.byte_ids(script.processor)} if script.case and script.fusion is None else set()
    printer, strange = Printer(script, ids), 0
    yield prompt
    for token in continued(model, cfg, ids, count, choice):
        strange += token in unexplained
        yield printer.push(token) if token != BOS_ID else "\n[the document ends here]"
    if printer.impossible:
        yield f"\n[{printer.impossible} case operators where no text has one were left out]"
    if strange:
        yield f"\n[{strange} of these ids are fused pairs: give --data, whose manifest.json says so]"
