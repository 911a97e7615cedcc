# docker build -f docker/training.Dockerfile -t factorlens-training .
FROM python:3.11-slim-bookworm AS build
WORKDIR /source
RUN python -m venv --without-pip /opt/factorlens
# Dependencies first, in a layer of their own: a change of the code does not fetch them again.
# Nothing is installed whose hash is not in the lock; setuptools stays, torch asks for it.
COPY docker/requirements.training.lock requirements.lock
RUN pip --python /opt/factorlens install --no-cache-dir --no-deps --require-hashes -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY bundle bundle
COPY models models
COPY training training
RUN pip --python /opt/factorlens install --no-cache-dir --no-deps --no-build-isolation .

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
