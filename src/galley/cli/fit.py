"""`galley fit`: what fits, said before loading."""

import click

from galley.cli.session import ENGINE_FLAGS, Session, settings_options
from galley.cli.terminal import print_json, print_table


@click.command()
@click.argument("model", metavar="MODEL")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@settings_options(ENGINE_FLAGS)
@click.pass_obj
def fit(session: Session, model: str, as_json: bool) -> int:
    """Say what context and concurrency of a model fit, before loading it.

    Exit code 0 when it fits, 1 when it does not.
    """
    entry = session.store.resolve(model)
    from galley.providers.fit import plan_fit
    from galley.providers.opened import EngineOptions

    engine = session.config.engine
    options = EngineOptions(**{name: getattr(engine, name) for name in EngineOptions.__struct_fields__})
    found = plan_fit(entry, options, available=None)
    if as_json:
        print_json(found)
        return 0 if found.fits else 1
    click.echo(f"{found.model}: {'fits' if found.fits else 'does not fit'}")
    for line in found.why:
        click.echo(f"  {line}")
    print_table(
        ("TOKENS EACH", "AT ONCE"), [(str(length), str(jobs)) for length, jobs in found.at_once.items()]
    )
    return 0 if found.fits else 1
