package server

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// commandTests has the exec commands that Nix clients were seen to send, and
// others.
var commandTests = []struct {
	in     string
	want   command
	status int    // of a refusal
	says   string // is in a refusal
}{
	{in: "nix-daemon --stdio", want: command{protocol: workerProtocol}},
	{in: "nix-store --serve --write", want: command{protocol: serveProtocol, write: true}},
	{in: "nix-store --serve", want: command{protocol: serveProtocol}},
	{in: "/nix/var/nix/profiles/default/bin/nix-daemon --stdio", want: command{protocol: workerProtocol}},
	{in: "nix-daemon --stdio --store 'local'", want: command{protocol: workerProtocol}}, // Nix 2.8
	{in: "nix-daemon --stdio --store local", want: command{protocol: workerProtocol}},
	{in: `"nix-daemon" '--stdio' \--store "au"to`, want: command{protocol: workerProtocol}},
	{in: "nix-daemon --stdio --store daemon", want: command{protocol: workerProtocol}},
	{in: "nix-daemon --stdio --store /other", status: exitError, says: `"--store"`},
	{in: "nix-daemon --stdio --store", status: exitError, says: `"--store"`},
	{in: "nix-daemon --stdio --process-ops", status: exitError, says: `"--process-ops"`},
	{in: "nix-daemon --force-untrusted --stdio", status: exitError, says: `"--force-untrusted"`},
	{in: "nix-daemon --stdio --write", status: exitError, says: `"--write"`},
	{in: "nix-daemon", status: exitError, says: "nix-daemon --stdio"},
	{in: "nix-store -r /nix/store/x", status: exitError, says: `"-r"`},
	{in: "nix-store --write", status: exitError, says: "nix-store --serve"},
	{in: "", want: command{protocol: shellProtocol}},
	{in: " \t\n", want: command{protocol: shellProtocol}},
	{in: "shell", want: command{protocol: shellProtocol}},
	{in: "shell settings timeout --set '7 8'", want: command{protocol: shellProtocol, words: []string{"settings", "timeout", "--set", "7 8"}}},
	{in: "api builds list", want: command{protocol: apiProtocol, words: []string{"builds", "list"}}},
	{in: "api", want: command{protocol: apiProtocol}},
	{in: "/bin/shell", status: exitNoCommand, says: `"shell"`},
	{in: "apis", status: exitNoCommand, says: `"apis"`},
	{in: "''", status: exitNoCommand, says: `"."`},
	{in: "uname -a", status: exitNoCommand, says: `"uname"`},
	{in: "nix-daemon --stdio; id", status: exitError, says: `"--stdio;"`},
	{in: "sh -c 'exec nix-daemon --stdio'", status: exitNoCommand, says: `"sh"`},
	{in: "$(nix-daemon) --stdio", status: exitNoCommand, says: `"$(nix-daemon)"`},
	{in: "nix-daemon '--stdio", status: exitError, says: "quote without end"},
	{in: `nix-daemon "--stdio`, status: exitError, says: "quote without end"},
	{in: `nix-daemon --stdio \`, status: exitError, says: "backslash at the end"},
	{in: strings.Repeat("x", maxCommandLen+1), status: exitError, says: "longer than"},
	{in: strings.Repeat("x", maxCommandLen), status: exitNoCommand, says: "…"},
}

func TestParseCommand(t *testing.T) {
	for _, test := range commandTests {
		t.Run(clip(test.in), func(t *testing.T) {
			got, err := parseCommand(test.in)
			if test.status == 0 {
				if diff := cmp.Diff(test.want, got, cmp.AllowUnexported(command{}), cmpopts.EquateEmpty()); err != nil || diff != "" {
					t.Errorf("%v %s", err, diff)
				}
				return
			}
			var refused *refusedCommand
			if !errors.As(err, &refused) || refused.status != test.status || !strings.Contains(refused.msg, test.says) {
				t.Fatalf("got %+v, %v; want status %d and %q", got, err, test.status, test.says)
			}
			if strings.Contains(refused.msg, "\n") || len(refused.msg) > 300 {
				t.Errorf("not one short line: %q", refused.msg)
			}
		})
	}
}

func TestSplitWords(t *testing.T) {
	for in, want := range map[string][]string{
		`a  b`:              {"a", "b"},
		`'a b'c`:            {"a bc"},
		`"a\"\\\$\x" ''`:    {`a"\$\x`, ""},
		`a\ b "" c`:         {"a b", "", "c"},
		`'it'\''s' "don't"`: {"it's", "don't"},
	} {
		got, err := splitWords(in)
		if err != nil {
			t.Errorf("%s: %v", in, err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: %s", in, diff)
		}
	}
}

func FuzzParseCommand(f *testing.F) {
	for _, test := range commandTests {
		f.Add(test.in)
	}
	f.Fuzz(func(t *testing.T, in string) {
		cmd, err := parseCommand(in)
		var refused *refusedCommand
		if err != nil && (!errors.As(err, &refused) || refused.status == 0 || len(refused.msg) > 1000) {
			t.Errorf("refusal %v", err)
		}
		if err == nil && cmd.protocol == 0 {
			t.Error("accepted without a protocol")
		}
	})
}
