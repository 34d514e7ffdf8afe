package builtin

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// Like TestUnpackTar: what is wanted is what Nix 2.34 made, or said, of packages
// with the same files.

// A packages is a folder with packages to make environments of.
type packages struct {
	t   *testing.T
	top string
}

// add makes a package of files, "PATH TEXT" or "PATH -> TARGET", in whose texts
// TOP is the folder.
func (p packages) add(name string, files ...string) {
	p.t.Helper()
	for _, f := range files {
		var err error
		if path, target, ok := strings.Cut(f, " -> "); ok {
			path = filepath.Join(p.top, name, path)
			err = os.MkdirAll(filepath.Dir(path), 0o755)
			if err == nil {
				err = os.Symlink(target, path)
			}
		} else {
			path, text, _ := strings.Cut(f, " ")
			path = filepath.Join(p.top, name, path)
			err = os.MkdirAll(filepath.Dir(path), 0o755)
			if err == nil {
				err = os.WriteFile(path, []byte(strings.ReplaceAll(text, "TOP", p.top)), 0o644)
			}
		}
		if err != nil {
			p.t.Fatal(err)
		}
	}
}

// build makes an environment of "ACTIVE PRIORITY N PATH…", in which paths begin
// with a slash and are below the folder.
func (p packages) build(derivations string) (made []string, log string) {
	p.t.Helper()
	out := filepath.Join(p.t.TempDir(), "out")
	var b strings.Builder
	o := orderOf("buildenv", out, "derivations", strings.ReplaceAll(derivations, " /", " "+p.top+"/"), "manifest", "/m")
	status := Run(p.t.Context(), o, &b)
	log = strings.NewReplacer(p.top, "", out, "OUT").Replace(b.String())
	if status == 0 {
		for _, line := range tree(p.t, out) {
			made = append(made, strings.ReplaceAll(line, p.top, ""))
		}
	} else if status != 1 || !strings.Contains(log, "error:") {
		p.t.Errorf("status %d, log %q", status, log)
	}
	return made, log
}

func warning(text string) string {
	return `@nix {"action":"msg","level":1,"msg":"\u001b[35;1mwarning:\u001b[0m ` + text + "\"}\n"
}

func TestBuildEnvironment(t *testing.T) {
	p := packages{t, t.TempDir()}
	p.add("a", "bin/a a", "bin/both a", "share/info/dir a", "lib/x/perllocal.pod a", "manifest.nix a", "manifest.json a",
		"dangling -> nowhere", "one/two/a a", "propagated-build-inputs a", "sbin -> bin", "one/two/link -> ../../bin/a",
		"nix-support/x x", ".hidden/x x", "log/x x")
	p.add("b", "bin/b b", "lib/y/y b", "one/two/b b", "sbin/c b", "nix-support/propagated-user-env-packages TOP/p1 TOP/p2\n")
	p.add("both", "bin/both both")
	p.add("p1", "bin/p p1", "bin/a p1", "nix-support/propagated-user-env-packages TOP/p3\n")
	p.add("p2", "bin/p p2", "bin/q p2")
	p.add("p3", "bin/r p3")
	p.add("file", " file")
	p.add("dirfile", "bin x")
	dangling := warning("skipping dangling symlink 'OUT/dangling'")
	alone := []string{"bin -> /a/bin", "lib -> /a/lib", "manifest.nix -> /m", "one -> /a/one", "sbin -> /a/sbin", "share -> /a/share"}
	merged := []string{
		"bin/", "bin/a -> /a/bin/a", "bin/b -> /b/bin/b", "bin/both -> /a/bin/both", "bin/p -> /p1/bin/p", "bin/q -> /p2/bin/q", "bin/r -> /p3/bin/r",
		"lib/", "lib/x -> /a/lib/x", "lib/y -> /b/lib/y", "manifest.nix -> /m",
		"one/", "one/two/", "one/two/a -> /a/one/two/a", "one/two/b -> /b/one/two/b", "one/two/link -> /a/one/two/link",
		"sbin/", "sbin/a -> /a/bin/a", "sbin/both -> /a/bin/both", "sbin/c -> /b/sbin/c", "share -> /a/share"}
	for _, tt := range []struct {
		name, derivations string
		want              []string
		log               string
	}{
		{"nothing", "", []string{"manifest.nix -> /m"}, ""},
		{"one", "true 5 1 /a", alone, dangling},
		{"twice", "true 5 1 /a true 5 1 /a", alone, dangling},
		{"two outputs", "true 5 2 /both /p3", []string{"bin/", "bin/both -> /both/bin/both", "bin/r -> /p3/bin/r", "manifest.nix -> /m"}, ""},
		{"merged", "true 5 1 /a true 6 1 /b", merged, dangling},
		{"a file gives way", "true 5 1 /a true 6 1 /dirfile true 7 1 /b", merged, dangling}, // to a symlink to a directory
		{"priority, inactive", "true 5 1 /a true 4 1 /both false 5 1 /b", []string{
			"bin/", "bin/a -> /a/bin/a", "bin/both -> /both/bin/both",
			"lib -> /a/lib", "manifest.nix -> /m", "one -> /a/one", "sbin -> /a/sbin", "share -> /a/share"}, dangling},
		{"file as package", "true 5 1 /file", []string{"manifest.nix -> /m"}, warning(`not including \"/file\" in the user environment because it's not a directory`)},
		{"conflict", "true 5 1 /a true 5 1 /both", nil, dangling +
			message("Unable to build profile. There is a conflict for the following files:\n\n         <\"/a/bin/both\">\n         <\"/both/bin/both\">")},
		{"directory and file", "true 5 1 /dirfile true 6 1 /a", nil,
			message(`collision between <"/a/bin"> and non-directory <"/dirfile/bin">`)},
		{"file and directory", "true 5 1 /both true 5 1 /p3 true 6 1 /dirfile", nil,
			message(`collision between non-directory '</dirfile/bin>' and directory '<OUT/bin>'`)},
		{"missing", "true 5 1 /none", nil, message(`cannot read directory <"/none">: <No such file or directory>`)},
		{"no number", "true x 1 /a", nil, message("'derivations' has the priority '<x>'")},
		{"too short", "true 5", nil, message("'derivations' ends after '<5>'")},
		{"too few", "true 5 3 /a", nil, message("'derivations' ends before an output of '<3>'")},
		{"huge", "true 5 99999999999999999999 /a", nil, message("'derivations' has the number of outputs '<99999999999999999999>'")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p.t = t
			made, log := p.build(tt.derivations)
			if diff := cmp.Diff(tt.want, made); diff != "" {
				t.Error(diff)
			}
			if log != tt.log {
				t.Errorf("it says\n%q, not\n%q", log, tt.log)
			}
		})
	}
}

func TestBuildEnvironmentAttributes(t *testing.T) {
	for _, tt := range []struct {
		order *Order
		want  string
	}{
		{orderOf("buildenv", "OUT", "manifest", "/m"), "attribute '<derivations>' missing"},
		{orderOf("buildenv", "OUT", "derivations", ""), "attribute '<manifest>' missing"},
		{&Order{Builder: "builtin:buildenv"}, "'<builtin:buildenv>' requires an 'out' output"},
		{&Order{Builder: "builtin:nonsense"}, "unsupported builtin builder '<nonsense>'"},
	} {
		t.Chdir(t.TempDir())
		var log strings.Builder
		if status := Run(t.Context(), tt.order, &log); status != 1 || log.String() != message(tt.want) {
			t.Errorf("status %d, log %q, want %q", status, log.String(), message(tt.want))
		}
	}
}
