package admincli

import (
	"bytes"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"nbd/server/adminapi"
)

// A request is what a command sent.
type request struct {
	method, path, query string
	body                map[string]any
}

// answering returns a state directory with a socket that gives one answer to
// all, and where the last request is kept.
func answering(t *testing.T, answer any) (state string, last *request) {
	t.Helper()
	state, err := os.MkdirTemp("", "nbd") // a short path, as sockets want it
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(state, adminapi.Socket))
	if err != nil {
		t.Fatal(err)
	}
	last = &request{}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		*last = request{method: r.Method, path: r.URL.Path, query: r.URL.RawQuery}
		_ = json.NewDecoder(r.Body).Decode(&last.body) // some have none
		_ = json.NewEncoder(w).Encode(answer)
	})}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	t.Cleanup(func() {
		_ = srv.Close()
		if err := <-served; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
		_ = os.RemoveAll(state)
	})
	return state, last
}

// execute runs one command and returns what it printed.
func execute(t *testing.T, state, args string) (string, error) {
	t.Helper()
	cmd := Command(state)
	cmd.SetArgs(strings.Fields(args))
	var out bytes.Buffer
	cmd.SetOut(&out)
	cmd.SetErr(&out)
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	err := cmd.ExecuteContext(t.Context())
	return out.String(), err
}

// TestSettingsCommand: each flag is the request that it should be.
func TestSettingsCommand(t *testing.T) {
	state, last := answering(t, adminapi.Setting{Name: "timeout", Value: 7, Text: "7", Origin: "account"})
	for args, want := range map[string][2]string{
		"settings timeout --set 7 --account alice":        {"set", "7"},
		"settings timeout --set=":                         {"set", ""},
		"settings substituters --add https://x --key K":   {"add", "https://x"},
		"settings substituters --remove=https://x":        {"remove", "https://x"},
		"settings timeout --reset --account alice --json": {"reset", ""},
	} {
		out, err := execute(t, state, args)
		if value, _ := last.body["value"].(string); err != nil || last.method != http.MethodPost || last.body["op"] != want[0] || value != want[1] {
			t.Errorf("%s: %v, %+v", args, err, last)
		}
		if strings.Contains(args, "alice") != (last.body["account"] == "alice") || strings.Contains(args, "--key") != (last.body["key"] == "K") {
			t.Errorf("%s: %+v", args, last)
		}
		if strings.HasPrefix(out, "{") != strings.Contains(args, "--json") || !strings.Contains(out, "account") {
			t.Errorf("%s: %s", args, out)
		}
	}
	for _, args := range []string{"settings timeout --set 7 --add 8", "settings --set 7", "settings a b", "token create alice", "token create alice --name x --ttl 1ms",
		"account link alice", "settings timeout --show --reset"} {
		if out, err := execute(t, state, args); err == nil {
			t.Errorf("%s is no error: %s", args, out)
		}
	}
}

// TestTokenCommand: the secret is all that is printed, or a member of the JSON.
func TestTokenCommand(t *testing.T) {
	state, last := answering(t, adminapi.AddedToken{Secret: "nbd_x", TokenInfo: adminapi.TokenInfo{Account: "alice", Name: "ci"}})
	out, err := execute(t, state, "token create alice --name ci --ttl 1h --permissions store:read,build:read")
	if err != nil || out != "nbd_x\n" || last.body["seconds"] != 3600.0 || len(last.body["permissions"].([]any)) != 2 {
		t.Errorf("%v, %q, %+v", err, out, last)
	}
	out, err = execute(t, state, "token create alice --name ci --json")
	var answer map[string]any
	if err := errors.Join(err, json.Unmarshal([]byte(out), &answer)); err != nil || answer["token"] != "nbd_x" || answer["name"] != "ci" || last.body["permissions"] != nil {
		t.Errorf("%v, %s, %+v", err, out, last)
	}
}
