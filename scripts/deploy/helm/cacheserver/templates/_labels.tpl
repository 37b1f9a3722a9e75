{{- define "cacheserver.selector" -}}
app.kubernetes.io/name: cacheserver
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "cacheserver.labels" -}}
{{ include "cacheserver.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}
