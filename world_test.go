package main

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

// world builds the program testdata/world for some architectures, as Go names
// them, in folders of dir.
func (s *script) world(ts *testscript.TestScript, args []string) error {
	dir, architectures := args[0], args[1:]
	for _, arch := range architectures {
		cmd := exec.Command("go", "build", "-trimpath", "-o", filepath.Join(dir, arch, "world"), "./testdata/world")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH="+arch)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("build the program that looks around: %w\n%s", err, out)
		}
	}
	return nil
}

// sameWorld compares what that program printed in Nix's sandbox and here. What
// may differ is in tables of vm/SANDBOX.md, under the headings that are named.
func (s *script) sameWorld(ts *testscript.TestScript, args []string) error {
	document, err := os.ReadFile("vm/SANDBOX.md")
	if err != nil {
		return err
	}
	allowed, err := allowedDifferences(string(document), args[2:])
	if err != nil {
		return err
	}
	nix, here := parseWorld(ts.ReadFile(args[0])), parseWorld(ts.ReadFile(args[1]))
	const few = 500 // a builder prints a thousand
	if len(nix) < few || len(here) < few {
		return fmt.Errorf("%d lines of Nix and %d of ours are too few", len(nix), len(here))
	}
	keys := slices.Sorted(maps.Keys(nix))
	for key := range here {
		if _, both := nix[key]; !both {
			keys = append(keys, key)
		}
	}
	var wrong []string
	for _, key := range keys {
		if nix[key] == here[key] {
			continue
		}
		if !slices.ContainsFunc(allowed, func(pattern string) bool { return matchWorld(pattern, key) }) {
			wrong = append(wrong, fmt.Sprintf("%s\n\tin Nix: %s\n\there:   %s", key, nix[key], here[key]))
		}
	}
	if len(wrong) > 0 {
		return fmt.Errorf("differences that vm/SANDBOX.md does not list:\n%s", strings.Join(wrong, "\n"))
	}
	return nil
}

// storeHash is in the names of store objects. Those of the program differ with
// whatever built it.
var storeHash = regexp.MustCompile(`[0-9a-z]{32}-`)

// parseWorld returns values by key.
func parseWorld(text string) map[string]string {
	values := map[string]string{}
	for line := range strings.Lines(storeHash.ReplaceAllString(text, "")) {
		if rest, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "world "); ok {
			key, value, _ := strings.Cut(rest, " = ")
			values[key] += value + "; "
		}
	}
	return values
}

// matchWorld reports whether a pattern, in which * is any text, is that of a key.
func matchWorld(pattern, key string) bool {
	flat := strings.NewReplacer("/", "\x00", "[", "\x01", "]", "\x02", "?", "\x03", "\\", "\x04")
	ok, err := path.Match(flat.Replace(pattern), flat.Replace(key))
	return ok && err == nil
}

// The recorded facts are those that must be the same, and the tables of the
// document can be read.
func TestSandboxDocument(t *testing.T) {
	document, err := os.ReadFile("vm/SANDBOX.md")
	if err != nil {
		t.Fatal(err)
	}
	machine, err := allowedDifferences(string(document), []string{"The machine"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := allowedDifferences(string(document), []string{"Older Nix", "The network of fixed outputs", "x"}); err == nil {
		t.Error("a heading that is not there is found")
	}
	for _, name := range []string{"plain", "i686", "structured"} {
		recorded, err := os.ReadFile(filepath.Join("testdata/world/nix-2.34", name))
		if err != nil {
			t.Fatal(err)
		}
		facts := parseWorld(string(recorded))
		if len(facts) < 600 {
			t.Errorf("%s has %d facts", name, len(facts))
		}
		for key := range facts {
			if i := slices.IndexFunc(machine, func(p string) bool { return matchWorld(p, key) }); i >= 0 {
				t.Errorf("%s: %s is the machine's, by %s", name, key, machine[i])
			}
		}
	}
}

// quoted finds the patterns in the first cell of a row.
var quoted = regexp.MustCompile("`([^`]+)`")

// allowedDifferences returns the patterns of keys in the tables under headings
// of the document, each of which must be there.
func allowedDifferences(document string, headings []string) ([]string, error) {
	var patterns []string
	found := map[string]bool{}
	heading := ""
	for line := range strings.Lines(document) {
		if h, ok := strings.CutPrefix(strings.TrimSpace(line), "## "); ok {
			heading = h
		}
		cells := strings.Split(line, "|")
		if len(cells) < 3 || !slices.Contains(headings, heading) {
			continue
		}
		for _, m := range quoted.FindAllStringSubmatch(cells[1], -1) {
			patterns = append(patterns, m[1])
			found[heading] = true
		}
	}
	for _, h := range headings {
		if !found[h] {
			return nil, fmt.Errorf("the document has no table under %q", h)
		}
	}
	return patterns, nil
}
