package vm

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestCertificates(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	const pem = "# Somebody\n-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
	usual := certificateFiles
	t.Cleanup(func() { certificateFiles = usual })
	certificateFiles = []string{filepath.Join(dir, "none"), write("second", pem), write("third", "x")}
	for _, tt := range []struct{ name, want, err string }{
		{"", pem, ""},
		{write("mine", pem+"mine"), pem + "mine", ""},
		{write("empty", ""), "", "has no certificate"},
		{write("large", strings.Repeat(" ", maxCertificates)+pem), "", "larger than 4 MiB"},
		{filepath.Join(dir, "none"), "", "no such file"},
	} {
		c := Config{StateDir: dir, Certificates: tt.name}
		text, err := c.certificates()
		if string(text) != tt.want || (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%q: %.100q, %v", tt.name, text, err)
		}
		// What was named must do when the server starts.
		if err := c.complete(); (err == nil) != (tt.err == "") {
			t.Errorf("%q: complete: %v", tt.name, err)
		}
	}
	certificateFiles = nil
	if text, err := new(Config).certificates(); text != nil || err != nil {
		t.Errorf("without any: %q, %v", text, err)
	}
}
