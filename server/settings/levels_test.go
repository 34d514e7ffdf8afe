package settings

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const someKey = "k-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY="

// samples has two values for each setting, as text, with what is shown of them.
var samples = map[string][2][2]string{
	"reuse-build-failures": {{"false"}, {"1", "true"}}, "reuse-build-timeouts": {{"true"}, {"", "false"}},
	"keep-builds-running": {{"1", "true"}, {"0", "false"}}, "timeout": {{"7"}, {"5"}}, "max-silent-time": {{"7"}, {"5"}},
	"max-log-size": {{"1K", "1024"}, {"5"}}, "max-cpu-hours-per-month": {{"1.5"}, {"0"}},
	"default-cpu": {{"3"}, {"1"}}, "min-cpu": {{"3"}, {"1"}}, "max-cpu": {{"3"}, {"1"}}, "min-mem": {{"300"}, {"100"}}, "max-mem": {{"300"}, {"100"}},
	"max-build-restarts": {{"2"}, {"0"}}, "substituters": {{"https://a.example https://b.example"}, {""}},
	"trusted-public-keys": {{someKey}, {""}}, "always-substitute": {{"true"}, {"false"}}, "never-substitute": {{"true"}, {"false"}},
	"caches":        {{"s3://bucket?region=x&secret-key=abc", "s3://bucket?region=x&secret-key=..."}, {"https://u:pw@c.example", "https://u:...@c.example"}},
	"access-tokens": {{"a.example=t", "a.example=..."}, {"b.example=u:p", "b.example=..."}},
	"max-storage":   {{"1M", "1048576"}, {"5"}}, "max-running-builds": {{"3"}, {"1"}}, "max-connections": {{"3"}, {"1"}},
	"signing-key-for-builds": {{"test/alice-1"}, {"test/alice-2"}}, "trusted-accounts": {{"bob carol"}, {"dave"}},
	"offer-signed": {{"k-1"}, {someKey}}, "share-results": {{"false"}, {"true"}}, "reuse-results": {{"own"}, {"none"}},
	"allow-addresses":       {{"10.1.0.0/16 cache.lan:8080"}, {"10.1.2.3"}},
	"public-cache":          {{"true"}, {"false"}},
	"oidc-subjects":         {{"issuer=https://i.example;audience=a;subject=repo:o/*"}, {""}},
	"settings-from-ssh-env": {{"false"}, {"true"}}, "settings-from-drv-env": {{"true"}, {"false"}},
	"default-permissions": {{"build:read store:read"}, {""}},
}

// sample returns the text of a sample and what is shown of it.
func sample(name string, n int) (text, shown string) {
	s := samples[name][n]
	if s[1] == "" && s[0] != "" {
		return s[0], s[0]
	}
	return s[0], s[1]
}

// layerOf returns a level that says one thing, in the way that it comes there.
func layerOf(t *testing.T, level Level, name, text string) Layer {
	t.Helper()
	s, ok := Lookup(name)
	if !ok {
		t.Fatalf("no setting %s", name)
	}
	var l Layer
	var err error
	switch level {
	case Environment:
		l, err = FromEnvironment(map[string]string{s.Variable(): text})
	case Derivation:
		l, err = FromDerivation(map[string]string{s.Variable(): text, "out": "/nix/store/x"})
	default:
		l = Layer{Level: level, Values: map[string]string{name: text}}
	}
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// canSet is what the table of the product says: who may set what, where.
func canSet(s *Setting, level Level, accountWrite bool) bool {
	accountOnly := []string{"max-cpu-hours-per-month", "trusted-accounts", "offer-signed", "share-results", "public-cache", "oidc-subjects"}
	operator := []string{"max-storage", "max-running-builds", "max-connections", "allow-addresses"}
	open := []string{"reuse-build-failures", "reuse-build-timeouts", "reuse-results", "keep-builds-running", "timeout", "max-silent-time", "max-log-size",
		"default-cpu", "min-cpu", "max-cpu", "min-mem", "max-mem", "max-build-restarts", "always-substitute", "never-substitute"}
	perAccount := []string{"trusted-accounts", "offer-signed", "public-cache", "oidc-subjects", "signing-key-for-builds"}
	switch {
	case level == System:
		return !slices.Contains(perAccount, s.Name)
	case level == Account:
		return true
	case slices.Contains(accountOnly, s.Name), slices.Contains(operator, s.Name):
		return false
	case level == Key:
		return true
	}
	return slices.Contains(open, s.Name) || accountWrite
}

// TestEachLevel: each setting counts where the table lets it be set, wins over
// each level before, and is refused elsewhere.
func TestEachLevel(t *testing.T) {
	for _, s := range All() {
		if _, ok := samples[s.Name]; !ok {
			t.Fatalf("no sample of %s", s.Name)
		}
		for level := System; level <= Derivation; level++ {
			for _, accountWrite := range []bool{false, true} {
				checkLevel(t, &s, level, accountWrite)
			}
		}
	}
}

func checkLevel(t *testing.T, s *Setting, level Level, accountWrite bool) {
	t.Helper()
	text, shown := sample(s.Name, 1)
	if text == "" && !s.IsList() && !s.value.isFlag() {
		t.Fatalf("%s: no second sample", s.Name)
	}
	l := layerOf(t, level, s.Name, text)
	l.AccountWrite = accountWrite
	e, err := Defaults().With(l)
	can := canSet(s, level, accountWrite)
	if level <= Key {
		if err != nil || len(e.Notes) > 0 == can {
			t.Errorf("%s, %s: %v, notes %q", s.Name, level, err, e.Notes)
		}
	} else if (err == nil) != can {
		t.Errorf("%s, %s, account:write %v: %v", s.Name, level, accountWrite, err)
	} else if err != nil && !strings.Contains(err.Error(), s.Variable()) {
		t.Errorf("%s: the error does not name the variable: %v", s.Name, err)
	}
	if !can {
		return
	}
	if got := e.Show(s); got != shown || e.Origin(s.Name).Level != level {
		t.Errorf("%s, %s: %q from %s, want %q", s.Name, level, got, e.Origin(s.Name), shown)
	}
	first, _ := sample(s.Name, 0)
	for before := Account; before < level; before++ {
		if !canSet(s, before, true) {
			continue
		}
		lower := layerOf(t, before, s.Name, first)
		lower.AccountWrite = true
		e, err := Defaults().With(lower)
		if err == nil {
			e, err = e.With(l)
		}
		if err != nil || e.Show(s) != shown || e.Origin(s.Name).Level != level {
			t.Errorf("%s: %s does not win over %s: %q from %s, %v", s.Name, level, before, e.Show(s), e.Origin(s.Name), err)
		}
	}
}

// TestClient: what a client sends wins over all, and nothing is no wish.
func TestClient(t *testing.T) {
	e, err := Defaults().With(layerOf(t, Derivation, "timeout", "5"))
	if err != nil {
		t.Fatal(err)
	}
	got := e.WithSent(Sent{Timeout: 9 * time.Second, MaxLogSize: 10})
	if got.Timeout != 9*time.Second || got.MaxSilentTime != 0 || got.MaxLogSize != 10 || got.Origin("timeout").String() != "client" {
		t.Errorf("%+v", got)
	}
	if got := e.WithSent(Sent{}); got.Timeout != 5*time.Second || got.Origin("timeout").String() != "derivation (NBD_TIMEOUT)" {
		t.Errorf("%v from %s", got.Timeout, got.Origin("timeout"))
	}
}

// TestCeilings: a level below the system can ask for less, not for more; no limit
// is more than any.
func TestCeilings(t *testing.T) {
	for _, c := range []struct{ name, system, asked, want string }{
		{"timeout", "10", "5", "5"}, {"timeout", "10", "20", "10"}, {"timeout", "10", "0", "10"}, {"timeout", "0", "20", "20"},
		{"max-silent-time", "10", "20", "10"}, {"max-log-size", "10", "20", "10"}, {"max-log-size", "10", "0", "10"},
		{"max-cpu", "4", "8", "4"}, {"max-cpu", "4", "2", "2"}, {"max-mem", "4096", "0", "4096"},
		{"max-build-restarts", "1", "3", "1"}, {"max-build-restarts", "0", "3", "0"}, {"max-build-restarts", "5", "0", "0"},
		{"max-cpu-hours-per-month", "10", "20", "10"}, {"max-cpu-hours-per-month", "10", "0.5", "0.5"}, {"max-cpu-hours-per-month", "0", "1", "0"},
		{"default-cpu", "2", "8", "8"}, {"max-connections", "10", "20", "20"}, // the operator's own word for one account
		{"reuse-build-failures", "false", "true", "true"},
	} {
		e, err := Defaults().With(Layer{Level: System, Values: map[string]string{c.name: c.system}})
		if err == nil {
			e, err = e.With(Layer{Level: Account, Values: map[string]string{c.name: c.asked}})
		}
		s, _ := Lookup(c.name)
		if got := e.Show(s); err != nil || got != c.want || e.Origin(c.name).Capped != (c.asked != c.want) {
			t.Errorf("%v: %q from %s, %v", c, got, e.Origin(c.name), err)
		}
	}
	// A default is no ceiling.
	e, err := Defaults().With(Layer{Level: Account, Values: map[string]string{"max-build-restarts": "9"}})
	if err != nil || e.MaxBuildRestarts != 9 {
		t.Errorf("%d restarts, %v", e.MaxBuildRestarts, err)
	}
	e, err = Defaults().With(Layer{Level: System, Values: map[string]string{"timeout": "10"}})
	if got := e.WithSent(Sent{Timeout: time.Minute}); err != nil || got.Timeout != 10*time.Second {
		t.Errorf("a client gets %v, %v", got.Timeout, err)
	}
}

// TestAliases: NBD_ counts first, the alias where that says nothing.
func TestAliases(t *testing.T) {
	for _, c := range []struct {
		env  map[string]string
		want time.Duration
	}{
		{map[string]string{"NIXBUILDNET_TIMEOUT": "6"}, 6}, {map[string]string{"NBD_TIMEOUT": "5", "NIXBUILDNET_TIMEOUT": "6"}, 5},
		{map[string]string{"NBD_TIMEOUT": "", "NIXBUILDNET_TIMEOUT": "6"}, 6}, {map[string]string{"timeout": "3", "TIMEOUT": "3"}, 0},
	} {
		l, err := FromEnvironment(c.env)
		if err != nil {
			t.Fatal(err)
		}
		if e, err := Defaults().With(l); err != nil || e.Timeout != c.want*time.Second {
			t.Errorf("%v: %v, %v", c.env, e.Timeout, err)
		}
	}
}

// TestWrongValues: one error that names the variable, and no secret.
func TestWrongValues(t *testing.T) {
	for variable, text := range map[string]string{
		"NBD_TIMEOUT": "soon", "NIXBUILDNET_MAX_SILENT_TIME": "-1", "NBD_MAX_LOG_SIZE": "1X", "NBD_REUSE_BUILD_FAILURES": "yes",
		"NBD_DEFAULT_CPU": "2.5", "NBD_REUSE_RESULTS": "some", "NBD_SUBSTITUTERS": "ftp://x", "NIXBUILDNET_TRUSTED_PUBLIC_KEYS": "x",
		"NBD_CACHES": "https://", "NBD_ACCESS_TOKENS": "hunter2", "NBD_DEFAULT_PERMISSIONS": "root", "NBD_TAG_": "x", "NBD_TAG_A:B": "x",
	} {
		l, err := FromEnvironment(map[string]string{variable: text})
		if err == nil {
			l.AccountWrite = true
			_, err = Defaults().With(l)
		}
		if err == nil || !strings.HasPrefix(err.Error(), variable+" ") || strings.Contains(err.Error(), "hunter2") || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s=%s: %v", variable, text, err)
		}
	}
}

// TestUnknown: what names no setting is passed over with a note.
func TestUnknown(t *testing.T) {
	l, err := FromEnvironment(map[string]string{"NBD_TIMEOUTS": "7", "NIXBUILDNET_X\n": "", "LANG": "C"})
	if err != nil {
		t.Fatal(err)
	}
	e, err := Defaults().With(l)
	if want := []string{"NBD_TIMEOUTS names no setting", "NIXBUILDNET_X? names no setting"}; err != nil || !slices.Equal(e.Notes, want) {
		t.Errorf("%v, %q", err, e.Notes)
	}
}

// TestStored: a stored value that cannot be read is passed over, and the rest
// counts.
func TestStored(t *testing.T) {
	e, err := Defaults().With(Layer{Level: Account, Values: map[string]string{"timeout": "soon", "gone": "1", "max-silent-time": "5"}})
	if err != nil || len(e.Notes) != 2 || e.MaxSilentTime != 5*time.Second || e.Timeout != 0 {
		t.Errorf("%v, %q", err, e.Notes)
	}
}

func TestTags(t *testing.T) {
	env := map[string]string{"NBD_TAG_CASE": "a", "NIXBUILDNET_TAG_CASE": "b", "NIXBUILDNET_TAG_job_1": "x\ny"}
	l, err := FromEnvironment(env)
	if err != nil {
		t.Fatal(err)
	}
	e, err := Defaults().With(l)
	if diff := cmp.Diff(map[string]string{"CASE": "a", "job_1": "x?y"}, e.Tags); err != nil || diff != "" {
		t.Error(err, diff)
	}
	l, err = FromDerivation(map[string]string{"NBD_TAG_CASE": "drv"})
	if err != nil {
		t.Fatal(err)
	}
	d, err := e.With(l)
	if err != nil || d.Tags["CASE"] != "drv" || d.Tags["job_1"] == "" || e.Tags["CASE"] != "a" {
		t.Errorf("%v, %v, %v", err, d.Tags, e.Tags)
	}
	many := map[string]string{}
	for i := range maxTags + 1 {
		many[fmt.Sprintf("NBD_TAG_%d", i)] = ""
	}
	if _, err := FromEnvironment(many); err == nil {
		t.Error("no bound on tags")
	}
}

// TestStructuredAttrs: attributes count as JSON as they would as text.
func TestStructuredAttrs(t *testing.T) {
	l, err := FromDerivation(map[string]string{"NBD_TIMEOUT": "1", "__json": `{"NIXBUILDNET_TIMEOUT":5,"NBD_KEEP_BUILDS_RUNNING":true,"NBD_REUSE_BUILD_FAILURES":"",
		"NBD_MAX_CPU":null,"NBD_TAG_A":"b","name":"x","NBD_SUBSTITUTERS":["https://a","https://b"]}`})
	if err != nil {
		t.Fatal(err)
	}
	l.AccountWrite = true
	e, err := Defaults().With(l)
	if err != nil || e.Timeout != 5*time.Second || !e.KeepBuildsRunning || e.ReuseBuildFailures || e.Tags["A"] != "b" || len(e.Substituters) != 2 {
		t.Errorf("%v, %+v", err, e)
	}
	if _, err := FromDerivation(map[string]string{"__json": `{"NBD_TIMEOUT":{"a":1}}`}); err == nil || !strings.Contains(err.Error(), "NBD_TIMEOUT") {
		t.Errorf("an object: %v", err)
	}
}

// TestHostPaths: file:// is the operator's; what he lists stays when an account
// has a list of its own.
func TestHostPaths(t *testing.T) {
	for _, name := range []string{"substituters", "caches"} {
		for level := Key; level <= Derivation; level++ {
			l := layerOf(t, level, name, "https://x.example FILE:///etc")
			l.AccountWrite = true
			e, err := Defaults().With(l)
			if err == nil && len(e.Notes) == 0 {
				t.Errorf("%s: %s names a path of the host", name, level)
			}
		}
		c := Change{Name: name, Op: Add, Value: "file:///srv"}
		if _, err := Edit(nil, Effective{}, Account, c); err == nil {
			t.Errorf("%s: the account adds a path of the host", name)
		}
		c.Operator = true
		values, err := Edit(nil, Effective{}, Account, c)
		if err != nil || !strings.HasSuffix(values[name], "file:///srv") {
			t.Errorf("%s: %v, %q", name, err, values)
		}
		// It stays when the account changes the rest.
		values, err = Edit(values, Effective{}, Account, Change{Name: name, Op: Add, Value: "https://y.example"})
		if err != nil || !strings.Contains(values[name], "file:///srv https://y.example") {
			t.Errorf("%s: %v, %q", name, err, values)
		}
	}
	system, err := Defaults().With(Layer{Level: System, Values: map[string]string{"substituters": "file:///srv https://x.example"}})
	if err != nil {
		t.Fatal(err)
	}
	values, err := Edit(nil, system, Account, Change{Name: "substituters", Op: Add, Value: "https://y.example"})
	if err != nil || values["substituters"] != "https://x.example https://y.example" {
		t.Errorf("%v, %q", err, values)
	}
	e, err := system.With(Layer{Level: Account, Values: values})
	s, _ := Lookup("substituters")
	if got := e.Show(s); err != nil || got != "file:///srv https://x.example https://y.example" {
		t.Errorf("%v, %q", err, got)
	}
}

func TestEdit(t *testing.T) {
	for _, c := range []struct {
		before string // "-" is not set
		change Change
		want   string // "!" and a part of the error
	}{
		{"-", Change{Name: "timeout", Op: Set, Value: "7"}, "7"}, {"7", Change{Name: "timeout", Op: Reset}, "-"},
		{"7", Change{Name: "timeout", Op: Set, Value: ""}, "!timeout"}, {"7", Change{Name: "timeout", Op: Add, Value: "1"}, "!no list"},
		{"-", Change{Name: "time", Op: Set, Value: "7"}, `!no setting "time"`},
		{"-", Change{Name: "max-storage", Op: Set, Value: "7"}, "!operator"}, {"-", Change{Name: "max-storage", Op: Set, Value: "7", Operator: true}, "7"},
		{"-", Change{Name: "keep-builds-running", Op: Set, Value: "1"}, "true"},
		{"-", Change{Name: "trusted-public-keys", Op: Add, Value: someKey}, defaultPublicKey + " " + someKey},
		{"-", Change{Name: "trusted-public-keys", Op: Remove, Value: "cache.nixos.org-1"}, ""},
		{"-", Change{Name: "trusted-public-keys", Op: Remove, Value: "other-1"}, "!no such item"},
		{"-", Change{Name: "trusted-public-keys", Op: Add, Value: "x"}, "!public keys"},
		{"bob", Change{Name: "trusted-accounts", Op: Add, Value: "bob,carol"}, "bob carol"},
		{"bob", Change{Name: "trusted-accounts", Op: Add, Value: ""}, "!needs an item"},
		{"a=1 b=2", Change{Name: "access-tokens", Op: Add, Value: "a=3"}, "b=2 a=3"}, {"a=1 b=2", Change{Name: "access-tokens", Op: Remove, Value: "a"}, "b=2"},
		{"s3://b?secret-key=x", Change{Name: "caches", Op: Remove, Value: "s3://b?secret-key=..."}, ""},
		{"-", Change{Name: "substituters", Op: Set, Value: strings.Repeat("https://x ", MaxText)}, "!longer"},
	} {
		values := map[string]string{}
		if c.before != "-" {
			values[c.change.Name] = c.before
		}
		got, err := Edit(values, Effective{}, Account, c.change)
		text, ok := got[c.change.Name]
		if !ok {
			text = "-"
		}
		if err != nil {
			text = "!" + err.Error()
		}
		if text != c.want && (c.want == "" || c.want[0] != '!' || err == nil || !strings.Contains(text, c.want[1:])) {
			t.Errorf("%+v on %q: %q, want %q", c.change, c.before, text, c.want)
		}
	}
}

// TestSecrets: nothing that prints a value shows what is secret in it.
func TestSecrets(t *testing.T) {
	e, err := Defaults().With(Layer{Level: Account, Values: map[string]string{
		"access-tokens": "h.example=hunter2", "caches": "s3://b?secret-access-key=hunter2&region=r https://u:hunter2@x.example/p?token=hunter2",
	}})
	if err != nil {
		t.Fatal(err)
	}
	var shown strings.Builder
	for _, s := range All() {
		fmt.Fprint(&shown, e.Show(&s), e.JSON(&s))
	}
	fmt.Fprintf(&shown, "%v %+v %#v", e.AccessTokens, e.AccessTokens, e.AccessTokens)
	fmt.Fprintf(&shown, "%v %+v", e.Caches, e)
	if strings.Contains(shown.String(), "hunter2") || !strings.Contains(shown.String(), "region=r") {
		t.Error(shown.String())
	}
	if e.AccessTokens[0].Token.Reveal() != "hunter2" || !strings.Contains(e.Caches[0].Raw(), "hunter2") {
		t.Error("the secrets are lost")
	}
}

func FuzzVariables(f *testing.F) {
	for _, s := range All() {
		text, _ := sample(s.Name, 0)
		f.Add(s.Variable(), text)
	}
	f.Add("NBD_TAG_A", "b")
	f.Add("__json", `{"NIXBUILDNET_TIMEOUT":5,"NBD_SUBSTITUTERS":["https://a"]}`)
	f.Fuzz(func(t *testing.T, name, text string) {
		for _, from := range []func(map[string]string) (Layer, error){FromEnvironment, FromDerivation} {
			l, err := from(map[string]string{name: text})
			if err != nil {
				continue
			}
			l.AccountWrite = true
			e, err := Defaults().With(l)
			if err != nil {
				continue
			}
			// What is read is written, and reads back alike.
			for _, s := range All() {
				if e.Origin(s.Name).Level == Default {
					continue
				}
				again := Defaults()
				if err := s.value.set(&again, s.value.raw(&e)); err != nil {
					t.Fatalf("%s: %q: %v", s.Name, s.value.raw(&e), err)
				}
				if got, want := s.value.raw(&again), s.value.raw(&e); got != want {
					t.Fatalf("%s: %q, was %q", s.Name, got, want)
				}
			}
		}
	})
}
