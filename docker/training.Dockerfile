# docker build -f docker/training.Dockerfile -t factorlens-training .
FROM python:3.11-slim-bookworm AS build
# Optional second package index, for example the one with the much smaller CPU build of torch.
ARG PIP_EXTRA_INDEX_URL
WORKDIR /source
RUN python -m venv --without-pip /opt/factorlens
# Dependencies first, in a layer of their own: a change of the code does not fetch them again.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN pip --python /opt/factorlens install --no-cache-dir -c constraints.txt ".[cpu,training]"
COPY bundle bundle
COPY models models
COPY training training
RUN pip --python /opt/factorlens install --no-cache-dir --no-deps --force-reinstall .

FROM python:3.11-slim-bookworm
COPY --from=build /opt/factorlens /opt/factorlens
ENV PATH=/opt/factorlens/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /workspace
USER 10001:10001
# What ctrl-C sends: the running epoch is given up, its predecessor's checkpoint stays usable.
STOPSIGNAL SIGINT
ENTRYPOINT ["python", "-m", "training"]
CMD ["--help"]
