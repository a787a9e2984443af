{{/* A model's values over the defaults, as JSON; mergeOverwrite would leave out 0 and "". Call with (list $ own). */}}
{{- define "tessera.model" -}}
{{- $model := deepCopy (index . 0).Values.serving.defaults }}
{{- range $key, $value := index . 1 }}
{{- if kindIs "map" $value }}
{{- range $inner, $part := $value }}
{{- $_ := set (index $model $key) $inner $part }}
{{- end }}
{{- else }}
{{- $_ := set $model $key $value }}
{{- end }}
{{- end }}
{{- toJson $model -}}
{{- end -}}

{{/* Models that are served, as JSON: those with a digest. Before its first promotion a model has an empty one, and no server. */}}
{{- define "tessera.servedModels" -}}
{{- $served := dict }}
{{- range $name, $own := .Values.serving.models }}
{{- if $own.digest }}
{{- $_ := set $served $name $own }}
{{- end }}
{{- end }}
{{- toJson $served -}}
{{- end -}}

{{/* Labels by which servers of a model are selected. Call with (list $ name). */}}
{{- define "tessera.modelSelector" -}}
{{ include "tessera.selectorLabels" (list (index . 0) "serving") }}
tessera.dev/model: {{ index . 1 }}
{{- end -}}

{{/* Folder of a model in the volume, as the store lays out its working copies. Call with (list $ digest). */}}
{{- define "tessera.modelFolder" -}}
/models/{{ regexReplaceAll "^[a-z0-9]+://" (index . 0).Values.store.uri "" }}/artifacts/{{ index . 1 }}
{{- end -}}

{{/* Environment of a container that opens the store. */}}
{{- define "tessera.storeEnvironment" -}}
envFrom:
  - configMapRef:
      name: tessera-settings
  {{- with .Values.store.existingSecret }}
  - secretRef:
      name: {{ . }}
  {{- end }}
{{- end -}}

{{/* The pod of a server. Call with (list $ name model). */}}
{{- define "tessera.serverPod" -}}
{{- $root := index . 0 }}
{{- $name := index . 1 }}
{{- $model := index . 2 }}
{{- $serving := $root.Values.serving }}
{{- $onCpu := eq (int $model.gpus) 0 }}
metadata:
  labels:
    {{- include "tessera.modelSelector" (list $root $name) | nindent 4 }}
spec:
  serviceAccountName: tessera-serving
  automountServiceAccountToken: false
  enableServiceLinks: false
  priorityClassName: {{ include "tessera.fullname" $root }}-serving
  terminationGracePeriodSeconds: {{ add $model.drainSeconds $model.longestAnswerSeconds }}
  securityContext:
    {{- include "tessera.podSecurityContext" $root | nindent 4 }}
  {{- with $model.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $model.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: kubernetes.io/hostname
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "tessera.modelSelector" (list $root $name) | nindent 10 }}
  initContainers:
    - name: fetch
      image: {{ include "tessera.image" (list $root "serve") }}
      imagePullPolicy: {{ $root.Values.images.pullPolicy }}
      command: [python, -m, pipelines, store, fetch, {{ $model.digest | quote }}]
      {{- with $serving.trustedKeys }}
      args:
        {{- range $number, $key := . }}
        - --trust=/keys/{{ $number }}.pem
        {{- end }}
      {{- end }}
      {{- include "tessera.storeEnvironment" $root | nindent 6 }}
      env:
        - {name: TESSERA_LOCAL, value: /models}
      resources:
        requests: {cpu: 100m, memory: 512Mi}
        limits: {memory: 2Gi}
      securityContext:
        {{- include "tessera.securityContext" $root | nindent 8 }}
      volumeMounts:
        - {name: models, mountPath: /models}
        - {name: home, mountPath: /home/tessera}
        - {name: tmp, mountPath: /tmp}
        {{- if $serving.trustedKeys }}
        - {name: keys, mountPath: /keys, readOnly: true}
        {{- end }}
  containers:
    - name: server
      image: {{ include "tessera.image" (list $root "serve") }}
      imagePullPolicy: {{ $root.Values.images.pullPolicy }}
      command: [python, -m, vllm.entrypoints.openai.api_server]
      args:
        - --model={{ include "tessera.modelFolder" (list $root $model.digest) }}
        - --served-model-name={{ $name }}
        - --host=0.0.0.0
        - --port={{ $serving.port }}
        - --reasoning-parser=tessera
        - '--default-chat-template-kwargs={"default_thinking": {{ $model.thinking | quote }}}'
        - --dtype={{ $model.dtype }}
        - --max-model-len={{ int $model.maxModelLen }}
        - --max-num-seqs={{ int $model.maxNumSeqs }}
        - --shutdown-timeout={{ int $model.longestAnswerSeconds }}
        - --middleware=components.core.serving.middleware.RequestLimit
        - --middleware=components.core.serving.middleware.LateStart
        - --disable-uvicorn-access-log
        {{- if $onCpu }}
        - --kv-cache-memory-bytes={{ int64 $model.kvCacheBytes }}
        - --enforce-eager
        - --no-enable-chunked-prefill
        - --max-num-batched-tokens={{ max 8192 (int $model.maxModelLen) }}
        {{- else }}
        - --tensor-parallel-size={{ int $model.gpus }}
        {{- end }}
        {{- range $model.extraArgs }}
        - {{ . | quote }}
        {{- end }}
      env:
        - {name: HOME, value: /home/tessera}
        - {name: USER, value: tessera}
        - {name: TESSERA_MAX_REQUEST_BYTES, value: {{ int64 $model.maxRequestBytes | quote }}}
        - {name: VLLM_PLUGINS, value: tessera}
        - {name: VLLM_ENABLE_V1_MULTIPROCESSING, value: "0"}
        - {name: VLLM_NO_USAGE_STATS, value: "1"}
        - {name: HF_HUB_OFFLINE, value: "1"}
        - {name: VLLM_WORKER_MULTIPROC_METHOD, value: spawn}
        {{- if $onCpu }}
        - {name: TORCH_COMPILE_DISABLE, value: "1"}
        {{- if dig "requests" "cpu" "" $model.resources }}
        - name: OMP_NUM_THREADS  # vLLM would start a thread for each core of the node, however few are the pod's
          valueFrom:
            resourceFieldRef: {resource: requests.cpu}
        {{- end }}
        {{- end }}
        {{- include "tessera.apiKey" $model | nindent 8 }}
      ports:
        - {name: http, containerPort: {{ $serving.port }}}
      startupProbe:  # ready means that a first token came
        exec:
          command: [python, -m, components.core.serving.first_token, {{ $serving.port | quote }}, {{ $name }}]
        periodSeconds: 10
        timeoutSeconds: 130
        failureThreshold: {{ max 1 (div $model.startSeconds 10) }}
      readinessProbe:
        httpGet: {path: /health, port: http}
        periodSeconds: 5
        timeoutSeconds: 5
      livenessProbe:
        httpGet: {path: /health, port: http}
        periodSeconds: 10
        timeoutSeconds: 10
        failureThreshold: 6
      lifecycle:
        preStop:
          sleep: {seconds: {{ int $model.drainSeconds }}}
      resources:
        {{- $limits := $model.resources.limits | default dict }}
        {{- if not $onCpu }}{{ $limits = merge (dict "nvidia.com/gpu" (int $model.gpus)) $limits }}{{ end }}
        {{- toYaml (merge (dict "limits" $limits) $model.resources) | nindent 8 }}
      securityContext:
        {{- include "tessera.securityContext" $root | nindent 8 }}
      volumeMounts:
        - {name: models, mountPath: /models, readOnly: true}
        - {name: home, mountPath: /home/tessera}
        - {name: tmp, mountPath: /tmp}
        - {name: shm, mountPath: /dev/shm}
  volumes:
    - name: models
      {{- if $model.cache.claim }}
      persistentVolumeClaim: {claimName: {{ $model.cache.claim }}}
      {{- else }}
      emptyDir:
        sizeLimit: {{ include "tessera.quantity" $model.cache.size }}
      {{- end }}
    - {name: home, emptyDir: {}}
    - {name: tmp, emptyDir: {}}
    - name: shm
      emptyDir: {medium: Memory}
    {{- if $serving.trustedKeys }}
    - name: keys
      configMap: {name: tessera-serving-keys}
    {{- end }}
{{- end -}}

{{/* The key that clients of a model send, as an environment variable that vLLM and the judge read. Call with the model. */}}
{{- define "tessera.apiKey" -}}
{{- with .apiKeySecret }}
- name: VLLM_API_KEY
  valueFrom:
    secretKeyRef: {name: {{ . }}, key: api-key}
{{- end }}
{{- end -}}
