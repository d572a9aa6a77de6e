import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from common import KEY, TEXT, URL, settled

home = Path(tempfile.mkdtemp())
rows = [
    f"- model_id: g-{name}\n  model_name: {name}\n  api_base: {URL}/v1\n  api_key_name: galley\n"
    for name in ("fake-1b", "nope", "slow")
]
(home / "extra-openai-models.yaml").write_text("".join(rows))
env = os.environ | {"LLM_USER_PATH": str(home)}
llm = str(Path(sys.executable).with_name("llm"))


def ask(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [llm, *words],
        env=env,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        stdin=subprocess.DEVNULL,
    )


done = ask("-m", "g-fake-1b", "--key", KEY, "hi")
assert done.stdout.strip() == TEXT, done
done = ask("-m", "g-fake-1b", "--no-stream", "--key", KEY, "hi")
assert done.stdout.strip() == TEXT, done
done = ask("-m", "g-nope", "--key", KEY, "hi")
assert done.returncode and "does not exist here" in done.stderr, done
done = ask("-m", "g-fake-1b", "--key", "sk-wrong", "hi")
assert done.returncode and "API key" in done.stderr, done
child = subprocess.Popen(
    [llm, "-m", "g-slow", "--key", KEY, "hi"], env=env, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
)
child.stdout.read(2)
child.send_signal(signal.SIGINT)
child.wait(20)
settled("slow", "disconnected")
