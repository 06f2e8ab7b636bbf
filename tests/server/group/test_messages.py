"""What rank 0 tells the others of a step."""

from server.commands import QueuedRequest, StepPlan
from server.group.messages import decode, encode
from server.protocol import GenerationRequest, Prompt
from turbocache.cache.outline import Outline


def test_a_prompt_arrives_with_its_outline() -> None:
    """All ranks pin the same pages and drop the same turns."""
    prompt = Prompt([1, 2, 3], outline=Outline(1, (1, 2), (3,)))
    request = GenerationRequest("r", prompt, None)
    plan = StepPlan(0.5, (QueuedRequest(request, lambda event: None, 8, 8),))
    (command,) = decode(encode(plan)).commands
    assert isinstance(command, QueuedRequest)
    assert command.request == request
    assert command.remote
