package main

import (
	"bytes"
	"strings"
	"testing"

	"nbd/store"
)

// TestErrors: one sentence that names the thing, and once the way out.
func TestErrors(t *testing.T) {
	locked := t.TempDir()
	st, err := store.Open(locked, store.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	for _, c := range []struct {
		args   string
		status int
		names  string
		hint   string
	}{
		{"nonsense", 2, `no command "nonsense"`, "nbd help"},
		{"serve extra", 2, "nbd serve takes no arguments", "nbd help"},
		{"serve --nonsense", 2, "--nonsense", "nbd help"},
		{"admin nonsense", 2, `no command "nonsense"`, "nbd help"},
		{"serve --log-level loud", 1, "debug, info, warn", ""},
		{"serve --ssh-listen 127.0.0.1:0 --state " + t.TempDir() + " --qemu /no/qemu", 1, "/no/qemu", "apt install"},
		{"serve --ssh-listen 127.0.0.1:0 --state " + locked, 1, "in use by another nbd", "--state"},
		{"serve --ssh-listen 127.0.0.1 --state " + t.TempDir(), 1, "missing port", "--ssh-listen"},
		{"admin status --state " + t.TempDir(), 1, "no server runs", "nbd serve"},
	} {
		var stderr bytes.Buffer
		if status := run(strings.Fields(c.args), &stderr, &stderr); status != c.status {
			t.Errorf("%s: status %d, want %d", c.args, status, c.status)
		}
		text, hint, _ := strings.Cut(stderr.String(), "\nnbd: hint: ")
		if !strings.Contains(text, c.names) || !strings.Contains(hint, c.hint) || (hint == "") != (c.hint == "") ||
			strings.Contains(strings.TrimSpace(text), "\n") || hint != "" && strings.Contains(text, strings.TrimSpace(hint)) {
			t.Errorf("%s:\n%s", c.args, stderr.String())
		}
	}
}
