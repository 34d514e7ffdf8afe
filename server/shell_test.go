package server

import (
	"encoding/json"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	gossh "golang.org/x/crypto/ssh"

	"nbd/nixproto"
	"nbd/store"
)

// addBuild stores the record of a build of an account.
func (ts *testServer) addBuild(a store.AccountID, change func(*store.Build)) *store.Build {
	ts.t.Helper()
	start := time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)
	b := &store.Build{Account: a, DrvPath: testDrv, Name: "test", System: "x86_64-linux", Status: store.StatusBuilt,
		Created: start, Started: start.Add(1500 * time.Millisecond), Stopped: start.Add(11500 * time.Millisecond),
		CPUs: 2, MemoryMiB: 2048, CPUSeconds: 20, LimitSeconds: 20, PeakMemory: 3 << 20, PeakStorage: 4 << 10}
	if change != nil {
		change(b)
	}
	if err := ts.store.NewBuild(ts.t.Context(), b); err != nil {
		ts.t.Fatal(err)
	}
	return b
}

// command runs one exec command with its input and returns what it wrote.
func (ts *testServer) command(key gossh.Signer, line, input string) (stdout, stderr string, status int) {
	ts.t.Helper()
	p := ts.exec(ts.dial(key), line)
	go func() {
		_, _ = io.WriteString(p.WriteCloser, input)
		_ = p.WriteCloser.Close()
	}()
	out, err := io.ReadAll(p.Reader)
	if err != nil {
		ts.t.Fatal(err)
	}
	status = p.status(ts.t.(*testing.T))
	return string(out), p.stderr.String(), status
}

// api runs an api command that has to succeed and decodes its answer.
func (ts *testServer) api(key gossh.Signer, line string, answer any) {
	ts.t.Helper()
	out, errs, status := ts.command(key, "api "+line, "")
	if status != 0 || errs != "" {
		ts.t.Fatalf("%s: status %d, %s", line, status, errs)
	}
	if err := json.Unmarshal([]byte(out), answer); err != nil {
		ts.t.Fatalf("%s: %v in %q", line, err, out)
	}
}

// shell runs lines in the shell on pipes.
func (ts *testServer) shell(key gossh.Signer, lines ...string) (stdout, stderr string, status int) {
	ts.t.Helper()
	return ts.command(key, "shell", strings.Join(lines, "\n")+"\n")
}

// ids are the build ids in an answer of builds list.
func ids(builds []apiBuild) (s string) {
	for _, b := range builds {
		s += fmt.Sprint(b.BuildID, " ")
	}
	return strings.TrimSpace(s)
}

func TestListBuilds(t *testing.T) {
	ts := newTestServer(t, nil)
	bob := newKey(t)
	other := ts.addAccount("bob", bob, nil)
	day := func(n int) func(*store.Build) {
		return func(b *store.Build) {
			b.Created = b.Created.AddDate(0, 0, n)
			b.Tags = map[string]string{"CASE": fmt.Sprint("c", n%2), "N": fmt.Sprint(n)}
		}
	}
	ts.addBuild(ts.account.ID, day(1)) // 1
	ts.addBuild(other.ID, day(1))      // 2
	ts.addBuild(ts.account.ID, day(2)) // 3
	ts.addBuild(ts.account.ID, func(b *store.Build) { day(3)(b); b.Status = store.StatusBuildFailed })
	ts.addBuild(ts.account.ID, func(b *store.Build) { day(4)(b); b.Reused, b.ReusedFrom = true, 1 })
	for _, test := range []struct{ args, want string }{
		{"", "4 3 1"},
		{"--reused", "5 4 3 1"},
		{"--tags CASE:c1", "4 1"},
		{"--tags=CASE:c1,N:3", "4"},
		{"--tags CASE:c1 --tags N:1", "1"},
		{"--tags CASE:", ""},
		{"--tags N:1,N:2", ""},
		{"--status built", "3 1"},
		{"--status built,build_failed", "4 3 1"},
		{"--status timeout", ""},
		{"--limit 2", "4 3"},
		{"--limit 0", "4 3 1"},
		{"--create-time-from 2026-11-03", "4 3"},
		{"--create_time_to 2026-11-03T12:00:00Z", "1"},
		{"--create-time-from 1793707200 --create-time-to 2026-11-04", "3"},
	} {
		var list []apiBuild
		ts.api(ts.alice, "builds list "+test.args, &list)
		if got := ids(list); got != test.want {
			t.Errorf("builds list %s: %q, want %q", test.args, got, test.want)
		}
	}
	for args, says := range map[string]string{
		"--tags CASE": "NAME:VALUE", "--status done": "there are pending", "--limit x": "--limit", "--limit -1": "--limit",
		"--create-time-from yesterday": "2026-11-30", "--nonsense": "no option --nonsense", "--tags": "needs a value", "7": "usage: builds list",
		"--reused=true": "takes no value",
	} {
		out, errs, status := ts.command(ts.alice, "api builds list "+args, "")
		var failure apiFailure
		if err := json.Unmarshal([]byte(errs), &failure); err != nil || out != "" || status != exitUsage || !strings.Contains(failure.Error, says) {
			t.Errorf("builds list %s: %d, %q, %q", args, status, out, errs)
		}
	}
}

// TestPages: a list is read in pages, and all of it comes.
func TestPages(t *testing.T) {
	ts := newTestServer(t, nil)
	for range buildPage + 3 {
		ts.addBuild(ts.account.ID, nil)
	}
	for _, limit := range []int{0, 1, buildPage - 1, buildPage, buildPage + 1, 2 * buildPage} {
		var list []apiBuild
		ts.api(ts.alice, fmt.Sprintf("builds list --limit %d", limit), &list)
		want := buildPage + 3
		if limit > 0 {
			want = min(limit, want)
		}
		if len(list) != want {
			t.Errorf("limit %d: %d builds, want %d", limit, len(list), want)
		}
	}
}

// TestBuildObject is the golden form of a build.
func TestBuildObject(t *testing.T) {
	ts := newTestServer(t, nil)
	ts.addBuild(ts.account.ID, func(b *store.Build) {
		b.Outputs = []store.BuildOutput{{Name: "out", Path: "/nix/store/3n58xw4373jp0ljirf06d8077j15pc4j-x", NarHash: nixproto.SumSHA256(nil), NarSize: 120}}
		b.Tags = map[string]string{"CASE": "x\x1b[2J\u009b"}
	})
	out, errs, status := ts.command(ts.alice, "api builds show 1", "")
	want := `{"build_id":1,"create_time":"2026-11-01T12:00:00Z","start_time":"2026-11-01T12:00:01Z","queue_time_seconds":1.5,"duration_seconds":10,` +
		`"build_status":"built","status":"built","status_message":"","cpu_count":2,"allocated_megabytes":2048,"cpu_seconds":20,` +
		`"peak_memory_use_kilobytes":3072,"peak_storage_use_kilobytes":4,"derivation_path":"` + string(testDrv) + `","system":"x86_64-linux",` +
		`"outputs":[{"name":"out","path":"/nix/store/3n58xw4373jp0ljirf06d8077j15pc4j-x","nar_hash":"sha256:0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73","nar_size_bytes":120}],` +
		`"tags":{"CASE":"x\u001b[2J\u009b"},"restart_of_build_id":null,"restarted_as_build_id":null,"reused_from_build_id":null}` + "\n"
	if out != want || status != 0 {
		t.Errorf("status %d %s\n%s\nwant\n%s", status, errs, out, want)
	}
}

// TestShellOnPipes: one command a line, until the end or exit; the exit status
// is that of the last command that failed.
func TestShellOnPipes(t *testing.T) {
	ts := newTestServer(t, nil)
	for _, test := range []struct {
		input, stdout, stderr string
		status                int
	}{
		{"", "", "", 0},
		{"\n  \n", "", "", 0},
		{"settings timeout --set 7\nsettings timeout --show\nexit\nnonsense\n", "7\n", "", 0},
		{"settings timeout --show", "7\n", "", 0}, // no end of line
		{"settings timeout --show\r\nquit\r\n", "7\n", "", 0},
		{"nonsense\nsettings timeout --show\n", "7\n", "nbd: error: there is no command \"nonsense\"; `help` lists all\n", 2},
		{"nonsense\nbuilds show 1\n", "", "nbd: error: there is no command \"nonsense\"; `help` lists all\nnbd: error: there is no build 1\n", 1},
		{"settings 'timeout --show\n", "", "nbd: error: cannot read the line: quote without end\n", 2},
		{"\x1b[2J\n", "", `nbd: error: there is no command "\x1b[2J"; ` + "`help` lists all\n", 2},
		{strings.Repeat("x", 3*maxCommandLen) + "\nsettings timeout --show\n", "7\n", "nbd: error: a line is longer than 8192 bytes\n", 2},
		{strings.Repeat("x", 3*maxCommandLen), "", "nbd: error: a line is longer than 8192 bytes\n", 2},
		{"ssh-keys add x --signature -\n", "", "nbd: error: \"x\" is not an SSH public key\n", 1},
	} {
		out, errs, status := ts.command(ts.alice, "shell", test.input)
		if out != test.stdout || errs != test.stderr || status != test.status {
			t.Errorf("%.40q: %d, %q, %q", test.input, status, out, errs)
		}
	}
	out, errs, status := ts.command(ts.alice, "shell show public-signing-key", "")
	if out != ts.account.PublicKey+"\n" || errs != "" || status != 0 {
		t.Errorf("one command: %d, %q, %q", status, out, errs)
	}
	if out, _, _ := ts.command(ts.alice, "shell help builds list", ""); !strings.Contains(out, "--tags K:V,…") || !strings.Contains(out, "build:read") {
		t.Errorf("help of a command: %q", out)
	}
	if out, _, _ := ts.command(ts.alice, "shell settings --help", ""); !strings.Contains(out, "max-cpu-hours-per-month") || !strings.Contains(out, "--reset") {
		t.Errorf("help of settings: %q", out)
	}
}

// TestOldestKeyCommand: the oldest published scripts keep stdin open until the
// key comes on stderr, cut off what is before it there, and put it behind what
// came on stdout; the whole becomes a line of nix.conf.
func TestOldestKeyCommand(t *testing.T) {
	ts := newTestServer(t, nil)
	key := ts.account.PublicKey
	p := ts.exec(ts.dial(ts.alice), "shell")
	if _, err := io.WriteString(p.WriteCloser, "show public-signing-key\n"); err != nil {
		t.Fatal(err)
	}
	var out [200]byte
	n, err := p.Reader.Read(out[:])
	if err != nil || string(out[:n]) != key {
		t.Fatalf("stdout %q, %v; want %q and no line end", out[:n], err, key)
	}
	deadline := time.Now().Add(patience)
	for !strings.HasSuffix(p.stderr.String(), "\n") && time.Now().Before(deadline) {
		time.Sleep(time.Millisecond) // nothing tells of what comes on stderr
	}
	line := strings.TrimSuffix(p.stderr.String(), "\n")
	if !regexp.MustCompile("test/[^:]+:").MatchString(line) {
		t.Fatalf("stderr %q", line)
	}
	found := string(out[:n]) + regexp.MustCompile(".*test> ").ReplaceAllString(line, "")
	if got := strings.Fields(found); !slices.Equal(got, []string{key, key}) || strings.Contains(found, "\n") {
		t.Errorf("the script finds %q", found)
	}
	if _, err := io.WriteString(p.WriteCloser, "settings timeout --show\n"); err != nil {
		t.Fatal(err)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if rest, err := io.ReadAll(p.Reader); err != nil || string(rest) != "\n0\n" {
		t.Errorf("then %q, %v", rest, err)
	}
	if status := p.status(t); status != 0 {
		t.Errorf("status %d", status)
	}
	for input, want := range map[string]string{
		"show public-signing-key\nexit\n":                      key + "\n",
		"show public-signing-key":                              key + "\n",
		"show public-signing-key\n":                            key + "\n",
		"show public-signing-key\nsettings timeout --show\n":   key + "\n0\n",
		"show public-signing-key\nshow public-signing-key\n\n": key + "\n" + key + "\n",
	} {
		if out, errs, status := ts.command(ts.alice, "shell", input); out != want || errs != "" || status != 0 {
			t.Errorf("%q: %d, %q, %q", input, status, out, errs)
		}
	}
}

// TestAPIErrors: errors are JSON on stderr, with nothing on stdout.
func TestAPIErrors(t *testing.T) {
	ts := newTestServer(t, nil)
	bob := newKey(t)
	other := ts.addAccount("bob", bob, nil)
	ts.addBuild(other.ID, nil) // 1
	for line, want := range map[string]string{
		"api":                     `{"error":"api needs a command; ` + "`api help`" + ` lists all"}`,
		"api builds show 1":       `{"error":"there is no build 1"}`, // another's
		"api builds log 1":        `{"error":"there is no build 1"}`,
		"api why 1":               `{"error":"there is no build 1"}`,
		"api builds show 2":       `{"error":"there is no build 2"}`, // nobody's
		"api builds show x":       `{"error":"\"x\" is not the id of a build, which is a number"}`,
		"api builds show '\x1b'":  `{"error":"\"\\x1b\" is not the id of a build, which is a number"}`,
		"api tokens revoke x":     `{"error":"there is no token \"x\""}`,
		"api settings nonsense":   `{"error":"there is no setting \"nonsense\"; ` + "`settings`" + ` lists all"}`,
		"api ssh-keys remove x":   `{"error":"there is no key \"x\"; ` + "`ssh-keys list`" + ` has the fingerprints"}`,
		"api store info /nix/x":   `{"error":"\"/nix/x\" is no store path"}`,
		"api exit --now":          `{"error":"exit has no option --now; ` + "`help exit`" + ` lists those it has"}`,
		"api usage --month 26-11": `{"error":"--month \"26-11\" is no month; write it like 2026-11"}`,
	} {
		out, errs, status := ts.command(ts.alice, line, "")
		if out != "" || errs != want+"\n" || status == 0 {
			t.Errorf("%s: %d, %q, %s", line, status, out, errs)
		}
	}
}

func TestSums(t *testing.T) {
	ts := newTestServer(t, nil)
	for i, status := range []string{store.StatusBuilt, store.StatusBuildFailed, store.StatusInternalError, store.StatusCancelled, store.StatusRunning, store.StatusBuilt} {
		ts.addBuild(ts.account.ID, func(b *store.Build) {
			b.Status = status
			b.Created, b.Started, b.Stopped = b.Created.Add(time.Duration(i)*time.Minute), b.Started.Add(time.Duration(i)*time.Minute), b.Stopped.Add(time.Duration(i)*time.Minute)
			switch status {
			case store.StatusBuilt:
				b.Outputs = []store.BuildOutput{{Name: "out", NarSize: 1500}}
			case store.StatusInternalError:
				b.CPUSeconds, b.LimitSeconds = 0, 0
			case store.StatusCancelled:
				b.CPUSeconds = 0
			}
			if i == 5 { // answered by the first one
				b.Reused, b.ReusedFrom, b.CPUSeconds, b.LimitSeconds, b.Started = true, 1, 0, 0, time.Time{}
			}
			b.Tags = map[string]string{"CASE": "sums"}
		})
	}
	var s apiSummary
	ts.api(ts.alice, "builds summary --tags CASE:sums --status built,build_failed,internal_error,cancelled", &s)
	want := apiSummary{BuildCount: 4, DiscardedBuildCount: 1, FailedBuildCount: 2, SuccessfulBuildCount: 1,
		TotalCPUSeconds: 60, BillableCPUSeconds: 40, TotalDurationSeconds: 40, WallTimeSeconds: 190, TotalOutputNarSizeKilobytes: 2}
	if s != want {
		t.Errorf("%+v, want %+v", s, want)
	}
	ts.api(ts.alice, "builds summary --status pending,running", &s)
	if s.BuildCount != 1 || s.RunningBuildCount != 1 {
		t.Errorf("running: %+v", s)
	}
	ts.api(ts.alice, "builds summary --tags CASE:none", &s)
	if s != (apiSummary{}) {
		t.Errorf("nothing: %+v", s)
	}
	var u apiUsage
	ts.api(ts.alice, "usage --month 2026-11", &u)
	if u.BuildCount != 5 || u.SuccessfulBuildCount != 1 || u.ReusedBuildCount != 1 || u.BillableCPUSeconds != 60 || u.BillableBuildCount != 3 ||
		u.LimitCPUSeconds != 80 || u.LeftCPUSeconds != nil {
		t.Errorf("usage %+v", u)
	}
	ts.shell(ts.alice, "settings max-cpu-hours-per-month --set 1")
	ts.api(ts.alice, "usage --month 2026-11", &u)
	if u.LeftCPUSeconds == nil || *u.LeftCPUSeconds != 3520 {
		t.Errorf("what is left: %v", u.LeftCPUSeconds)
	}
	if out, errs, _ := ts.shell(ts.alice, "usage --month 2026-11"); !strings.Contains(out, "left       3520 s (0.98 h)") {
		t.Errorf("usage: %s%s", out, errs)
	}
}
