package builtin

import (
	"archive/tar"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// One test for each advisory about Nix's builtin builders; the list is in
// vm/THREATS.md.

// CVE-2024-45593: an archive with a symlink and then a directory of the same
// name was unpacked through the symlink.
func TestCVE202445593(t *testing.T) {
	victim := t.TempDir()
	str := func(words ...string) string {
		var b strings.Builder
		for _, s := range words {
			b.WriteString(string([]byte{byte(len(s)), 0, 0, 0, 0, 0, 0, 0}) + s + strings.Repeat("\x00", -len(s)&7))
		}
		return b.String()
	}
	attack := str("nix-archive-1", "(", "type", "directory",
		"entry", "(", "name", "a", "node", "(", "type", "symlink", "target", victim, ")", ")",
		"entry", "(", "name", "a", "node", "(", "type", "directory",
		"entry", "(", "name", "f", "node", "(", "type", "regular", "contents", "x", ")", ")", ")", ")", ")")
	s := newSite(t, false, func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte(attack)) })
	made, log := s.fetch("url", "SITE/x.nar", "unpack", "1")
	if made != nil || !strings.Contains(log, "bad archive: ") {
		t.Errorf("made %q: %s", made, log)
	}
	if left := tree(t, victim); len(left) > 0 {
		t.Errorf("made elsewhere: %q", left)
	}
}

// CVE-2024-47174: builtin:fetchurl did not check certificates, so that somebody
// in between could read what a URL or netrc file held. (A wrong file was never
// accepted: its hash is known.)
func TestCVE202447174(t *testing.T) {
	s := newSite(t, true, func(w http.ResponseWriter, r *http.Request) { w.Write([]byte("x")) })
	for name, ca := range map[string]string{"none": "", "empty": "\n", "other": string(otherAuthority(t))} {
		if err := os.WriteFile(s.ca, []byte(ca), 0o644); err != nil {
			t.Fatal(err)
		}
		made, log := s.fetch("url", strings.Replace(s.URL, "//", "//user:password@", 1))
		if made != nil || !strings.Contains(log, "unable to download") {
			t.Errorf("%s: made %q: %s", name, made, log)
		}
	}
	// Nor on the way from a site without.
	from := newSite(t, false, func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, s.URL+"/x", http.StatusFound) })
	if made, log := from.fetch("url", "SITE/x"); made != nil || !strings.Contains(log, "certificate") {
		t.Errorf("made %q: %s", made, log)
	}
	if len(s.asked) > 0 {
		t.Errorf("it was asked for %q", s.asked)
	}
}

// GHSA-gr92-w2r5-qw5p: a member of an archive with an absolute name was written
// there, and hard links were made to what is there.
func TestGHSAgr92w2r5qw5p(t *testing.T) {
	victim := t.TempDir()
	if err := os.WriteFile(filepath.Join(victim, "f"), []byte("unharmed"), 0o600); err != nil {
		t.Fatal(err)
	}
	name := strings.TrimPrefix(victim, "/")
	for _, format := range []tar.Format{tar.FormatGNU, tar.FormatPAX} {
		made, log := unpack(t, tarOf(t, format, member{victim + "/f", file, "x", 0}, member{"//" + name + "/g", file, "x", 0}, member{victim + "/d", dir, "", 0}))
		if log != "" || !strings.HasSuffix(strings.Join(made, "\n"), "/f x\nchan/"+below(name)+"/g x") {
			t.Errorf("made %q: %s", made, log)
		}
		if _, log := unpack(t, tarOf(t, format, member{"d/h", hard, victim + "/f", 0})); !strings.Contains(log, "does not exist") {
			t.Error(log)
		}
	}
	if diff := cmp.Diff([]string{"f unharmed"}, tree(t, victim)); diff != "" {
		t.Error(diff)
	}
}

// below is a path without its first name.
func below(path string) string {
	_, rest, _ := strings.Cut(path, "/")
	return rest
}
