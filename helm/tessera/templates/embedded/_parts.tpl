{{/* Objects around the pod of an embedded part. Call with (list $ name port): account, volume and service. */}}
{{- define "tessera.embedded" -}}
{{- $root := index . 0 }}
{{- $name := index . 1 }}
apiVersion: v1
kind: ServiceAccount
metadata:
  {{- include "tessera.metadata" (list $root $name $name) | nindent 2 }}
automountServiceAccountToken: false
{{- include "tessera.imagePullSecrets" $root }}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  {{- include "tessera.metadata" (list $root $name $name) | nindent 2 }}
  annotations:
    helm.sh/resource-policy: keep
spec:
  accessModes: [ReadWriteOnce]
  {{- with $root.Values.embedded.storageClass }}
  storageClassName: {{ . | trimPrefix "-" | quote }}
  {{- end }}
  resources:
    requests:
      storage: {{ include "tessera.quantity" (index $root.Values.embedded $name).size }}
---
apiVersion: v1
kind: Service
metadata:
  {{- include "tessera.metadata" (list $root $name $name) | nindent 2 }}
spec:
  clusterIP: None
  selector:
    {{- include "tessera.selectorLabels" (list $root $name) | nindent 4 }}
  ports:
    - {name: http, port: {{ index . 2 }}, targetPort: http}
    {{- if and $root.Values.monitoring.enabled (eq $name "s3") }}
    - {name: metrics, port: 9327, targetPort: metrics}
    {{- end }}
{{- end -}}

{{/* A StatefulSet up to its containers. Call with (list $ name). */}}
{{- define "tessera.statefulSet" -}}
{{- $root := index . 0 }}
{{- $name := index . 1 }}
apiVersion: apps/v1
kind: StatefulSet
metadata:
  {{- include "tessera.metadata" (list $root $name $name) | nindent 2 }}
spec:
  replicas: 1
  serviceName: tessera-{{ $name }}
  selector:
    matchLabels:
      {{- include "tessera.selectorLabels" (list $root $name) | nindent 6 }}
  template:
    metadata:
      labels:
        {{- include "tessera.selectorLabels" (list $root $name) | nindent 8 }}
    spec:
      serviceAccountName: tessera-{{ $name }}
      automountServiceAccountToken: false
      enableServiceLinks: false
      securityContext:
        {{- include "tessera.podSecurityContext" $root | nindent 8 }}
      volumes:
        - name: data
          persistentVolumeClaim:
            claimName: tessera-{{ $name }}
        - name: tmp
          emptyDir: {sizeLimit: 1Gi}
      containers:
{{- end -}}
