package server

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestTable: what holds for every row of the table of commands.
func TestTable(t *testing.T) {
	var names []string
	for _, cmd := range apiCommands() {
		names = append(names, cmd.name)
		if len(strings.Fields(cmd.name)) > 2 || cmd.run == nil || cmd.help == "" || strings.HasSuffix(cmd.help, ".") {
			t.Errorf("%s: name of at most two words, run, one line of help", cmd.name)
		}
		if cmd.text == nil && cmd.name != "builds log" {
			t.Errorf("%s has no text", cmd.name)
		}
		if cmd.need != "" && !slices.Contains(allPermissions, cmd.need) {
			t.Errorf("%s needs %q", cmd.name, cmd.need)
		}
		for _, f := range cmd.flags {
			if !strings.HasPrefix(f.name, "--") || f.help == "" || strings.ContainsAny(f.name, "_ =") {
				t.Errorf("%s: option %q", cmd.name, f.name)
			}
		}
	}
	slices.Sort(names)
	if len(slices.Compact(slices.Clone(names))) != len(names) {
		t.Errorf("a command is there twice: %q", names)
	}
	for alias, full := range apiAliases {
		if commandNamed(full) == nil || commandNamed(alias) != nil {
			t.Errorf("alias %s of %s", alias, full)
		}
	}
}

var callTests = []struct {
	line  string
	name  string
	args  []string
	flags map[string][]string
	says  string // is in the refusal
}{
	{line: "builds", name: "builds list"},
	{line: "builds list", name: "builds list"},
	{line: "builds --limit 3", name: "builds list", flags: map[string][]string{"--limit": {"3"}}},
	{line: "builds list --tags A:b --tags=C:d=e", name: "builds list", flags: map[string][]string{"--tags": {"A:b", "C:d=e"}}},
	{line: "builds show 7", name: "builds show", args: []string{"7"}},
	{line: "builds show --help", name: "builds show", says: "usage"},
	{line: "settings", name: "settings"},
	{line: "settings timeout --set -1", name: "settings", args: []string{"timeout"}, flags: map[string][]string{"--set": {"-1"}}},
	{line: "settings timeout --set=", name: "settings", args: []string{"timeout"}, flags: map[string][]string{"--set": {""}}},
	{line: "show public-signing-key", name: "show public-signing-key"},
	{line: "ssh-keys add ssh-ed25519 AAAA me@host", name: "ssh-keys add", args: []string{"ssh-ed25519", "AAAA", "me@host"}},
	{line: "quit", name: "exit"},
	{line: "?", name: "help"},
	{line: "frobnicate", says: `no command "frobnicate"`},
	{line: "builds frobnicate", says: `no command "builds frobnicate"`},
	{line: "show", says: "not complete"},
	{line: "builds show", says: "usage: builds show ID"},
	{line: "builds show 1 2", says: "usage: builds show ID"},
	{line: "builds list --no", says: "no option --no"},
	{line: "builds list --reused=1", says: "takes no value"},
	{line: "builds list --limit", says: "needs a value: N"},
	{line: "exit now", says: "usage: exit"},
}

func TestParseCall(t *testing.T) {
	for _, test := range callTests {
		cmd, c, err := parseCall(strings.Fields(test.line))
		if test.says != "" && err != nil {
			if !strings.Contains(err.Error(), test.says) || apiStatus(err) != exitUsage {
				t.Errorf("%s: %v", test.line, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", test.line, err)
			continue
		}
		if test.flags == nil {
			test.flags = map[string][]string{}
		}
		if test.says == "" && (cmd.name != test.name || !cmp.Equal(c.args, test.args) || !cmp.Equal(c.flags, test.flags)) {
			t.Errorf("%s: %s, %q, %q", test.line, cmd.name, c.args, c.flags)
		}
	}
}

// FuzzParseCall: any line is a command or one refusal.
func FuzzParseCall(f *testing.F) {
	for _, test := range callTests {
		f.Add(test.line)
	}
	f.Fuzz(func(t *testing.T, line string) {
		words, err := splitWords(line)
		if err != nil || len(words) == 0 {
			return
		}
		cmd, c, err := parseCall(words)
		if err != nil {
			if apiStatus(err) != exitUsage || len(err.Error()) > 2000 {
				t.Errorf("refusal %v", err)
			}
			return
		}
		least, most := cmd.arity()
		if len(c.args) < least || len(c.args) > most {
			t.Errorf("%s with %d arguments", cmd.name, len(c.args))
		}
		for name := range c.flags {
			if cmd.flag(name) == nil {
				t.Errorf("%s with %s", cmd.name, name)
			}
		}
	})
}

// permissionLines have a command for each row of the table.
var permissionLines = map[string]string{
	"builds list": "", "builds show": "1", "builds log": "1", "builds cancel": "1", "builds restart": "1", "builds attach": "1",
	"builds summary": "", "why": "1", "usage": "", "settings": "timeout --show", "ssh-keys list": "",
	"ssh-keys add": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOrvP89uyupCbqyFcCz1nNtKuLT8YIUkj0Vhf/xYamSs", "ssh-keys remove": "SHA256:x",
	"signing-keys list": "", "show public-signing-key": "", "tokens create": "--name x", "tokens list": "", "tokens revoke": "x",
	"store list": "", "store info": "", "help": "", "exit": "",
}

// TestCommandPermissions: each command is refused without its permission, which the
// refusal names, and lets who has that alone pass.
func TestCommandPermissions(t *testing.T) {
	ts := newTestServer(t, nil)
	none := ts.addKey([]string{}...)
	keys := map[Permission]int{}
	for _, cmd := range apiCommands() {
		args, ok := permissionLines[cmd.name]
		if !ok {
			t.Errorf("no line for %s", cmd.name)
			continue
		}
		need := cmd.need
		if cmd.name == "settings" {
			need = AccountRead
		}
		keys[need]++
		_, errs, status := ts.command(none, "api "+cmd.name+" "+args, "")
		var failure apiFailure
		switch {
		case need == "":
			if status != 0 || errs != "" {
				t.Errorf("%s without permissions: %d %s", cmd.name, status, errs)
			}
		case json.Unmarshal([]byte(errs), &failure) != nil || status != 1 || !strings.Contains(failure.Error, "permission denied") || !strings.Contains(failure.Error, string(need)):
			t.Errorf("%s without %s: %d %s", cmd.name, need, status, errs)
		}
	}
	for need := range keys {
		if need == "" {
			continue
		}
		key := ts.addKey(string(need))
		for _, cmd := range apiCommands() {
			if cmd.need != need {
				continue
			}
			if _, errs, _ := ts.command(key, "api "+cmd.name+" "+permissionLines[cmd.name], ""); strings.Contains(errs, "permission denied") {
				t.Errorf("%s with %s: %s", cmd.name, need, errs)
			}
		}
	}
	// The shell opens for any key.
	if out, errs, status := ts.shell(none, "help", "settings timeout --set 7", "settings timeout --show"); !strings.Contains(out, "builds list") ||
		status != 1 || strings.Count(errs, "account:write")+strings.Count(errs, "account:read") != 2 {
		t.Errorf("shell: %d\n%s%s", status, out, errs)
	}
}
