package server

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	gossh "golang.org/x/crypto/ssh"
)

func TestLoadHostKey(t *testing.T) {
	dir := t.TempDir()
	first, err := LoadHostKey(dir)
	if err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(filepath.Join(dir, HostKeyFile))
	if err != nil || st.Mode() != 0o600 {
		t.Errorf("host key has mode %v, %v", st.Mode(), err)
	}
	pub := readPublic(t, dir)
	if !bytes.Equal(pub.Marshal(), first.PublicKey().Marshal()) {
		t.Error("public half is of another key")
	}
	if err := os.Remove(filepath.Join(dir, HostKeyFile+".pub")); err != nil {
		t.Fatal(err)
	}
	again, err := LoadHostKey(dir)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(again.PublicKey().Marshal(), pub.Marshal()) || !bytes.Equal(readPublic(t, dir).Marshal(), pub.Marshal()) {
		t.Error("another key the second time")
	}
	left, err := filepath.Glob(filepath.Join(dir, ".*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left over: %v, %v", left, err)
	}
}

func readPublic(t *testing.T, dir string) gossh.PublicKey {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(dir, HostKeyFile+".pub"))
	if err != nil {
		t.Fatal(err)
	}
	pub, _, _, _, err := gossh.ParseAuthorizedKey(text)
	if err != nil {
		t.Fatal(err)
	}
	return pub
}

func TestLoadHostKeyDamaged(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, HostKeyFile), []byte("junk"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := LoadHostKey(dir)
	if err == nil || !strings.Contains(err.Error(), HostKeyFile) {
		t.Errorf("error %v does not name the file", err)
	}
}
