package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime/debug"
	"slices"
	"strings"

	"github.com/gliderlabs/ssh"
	gossh "golang.org/x/crypto/ssh"

	"nbd/server/settings"
	"nbd/store"
)

// Bounds of the settings that a session may send.
const (
	maxEnv      = 256      // number of variables that are kept
	maxEnvBytes = 64 << 10 // in all
)

// A session is the serving side of a Session: its channel and its place in the
// server.
type session struct {
	*Session
	server *Server
	conn   *conn
	ch     gossh.Channel
	ctx    context.Context   // ends when the client is gone or the server closes
	busy   bool              // a request is being worked on; guarded by server.mu
	term   terminalSize      // of the client's terminal, if it has one
	json   bool              // its command is api: errors are JSON
	trust  *store.Settings   // that the Sight was last restricted to; nil before
	tokens map[string]string // variables that may bring a token; kept apart from Env, which is told to others
}

// handleSession serves one session channel until the client closes it.
func (s *Server) handleSession(_ *ssh.Server, sc *gossh.ServerConn, nc gossh.NewChannel, ctx ssh.Context) {
	c := ctx.Value(connKey{}).(*conn)
	client := clientOf(sc) // nil for who comes with a token
	if client == nil && sc.User() != tokenUser || !s.beginWork() {
		_ = nc.Reject(gossh.Prohibited, "the server is shutting down")
		return
	}
	defer s.work.Done()
	if most := c.tooMany(); most > 0 && client != nil {
		_ = nc.Reject(gossh.ResourceShortage, tooManyConnections(client, most).Error())
		return
	}
	if !c.openSession() {
		_ = nc.Reject(gossh.ResourceShortage, fmt.Sprintf("more than %d sessions on one connection", s.cfg.MaxSessions))
		return
	}
	defer c.closeSession()
	ch, reqs, err := nc.Accept()
	if err != nil {
		s.log.Debug("session not opened", "client", sc.RemoteAddr(), "err", err)
		return
	}
	id := s.newSessionID()
	log := s.log.With("session", id)
	if client != nil {
		log = log.With("client", client.Account.Name)
	}
	ss := &session{Session: &Session{ID: id, Client: client, Env: map[string]string{}, Log: log, book: s.book, storage: s.storage}, server: s, conn: c, ch: ch, tokens: map[string]string{}}
	var end context.CancelFunc
	ss.ctx, end = context.WithCancel(ctx)
	defer end()
	done := ss.answerRequests(reqs)
	end()
	if done != nil {
		<-done
	}
}

// answerRequests answers the channel's requests until it is closed. It returns
// what is closed when the command that it started, if any, has ended.
func (ss *session) answerRequests(reqs <-chan *gossh.Request) (done chan struct{}) {
	room := maxEnvBytes
	for req := range reqs {
		ok := false
		switch req.Type {
		case "env":
			// All are accepted: a client may be set up to send its locale.
			ok = done == nil && ss.setEnv(req.Payload, &room)
		case "pty-req":
			ok = done == nil && ss.term.granted(req.Payload)
		case "window-change":
			ok = ss.term.changed(req.Payload)
		case "exec", "shell":
			ok = done == nil
		}
		if err := req.Reply(ok, nil); err != nil {
			continue // the channel is closing
		}
		if ok && (req.Type == "exec" || req.Type == "shell") {
			done = make(chan struct{})
			go func() {
				defer close(done)
				ss.run(req)
			}()
		}
	}
	return done
}

// setEnv keeps a variable that is a setting of the service, as long as there is
// room.
func (ss *session) setEnv(payload []byte, room *int) bool {
	var kv struct{ Name, Value string }
	if err := gossh.Unmarshal(payload, &kv); err != nil {
		return false
	}
	isToken := slices.Contains(tokenVariables, kv.Name)
	if !isToken && !settings.IsVariable(kv.Name) {
		return true
	}
	size := len(kv.Name) + len(kv.Value)
	if size > *room || len(ss.Env) >= maxEnv {
		return false
	}
	*room -= size
	if isToken {
		ss.tokens[kv.Name] = kv.Value
	} else {
		ss.Env[kv.Name] = kv.Value
	}
	return true
}

// tokenVariables are those that bring a token; the first one that is there counts.
var tokenVariables = []string{"NBD_TOKEN", "NIXBUILDNET_TOKEN", "token"}

// authorise finds who the client is that came without a key, by the token that it
// sent for the session.
func (ss *session) authorise() error {
	secret := ""
	for _, name := range tokenVariables {
		secret = cmp.Or(secret, strings.TrimSpace(ss.tokens[name]))
	}
	if secret == "" {
		return refusef("user %s needs a token: send it as the variable NBD_TOKEN of the session (SetEnv or SendEnv of ssh)", tokenUser)
	}
	client, err := ss.server.auth.token(ss.ctx, secret, ss.conn.isToken)
	if err != nil {
		return err
	}
	ss.conn.authenticated()
	ss.Client = client
	ss.Log = ss.Log.With("client", client.Account.Name)
	return nil
}

// run runs the command of an exec or shell request and ends the channel.
func (ss *session) run(req *gossh.Request) {
	status := exitError
	defer func() {
		// The last line of defence: a mistake in serving one session must not
		// end the server.
		if p := recover(); p != nil {
			ss.Log.Error("session ended by a fault of the server", "panic", p, "stack", string(debug.Stack()))
		}
		ss.exit(status)
	}()
	var exec struct{ Command string }
	if req.Type == "exec" {
		if err := gossh.Unmarshal(req.Payload, &exec); err != nil {
			ss.complain("cannot read the exec request")
			return
		}
		ss.json = exec.Command == "api" || strings.HasPrefix(exec.Command, "api ")
	}
	if ss.Client == nil {
		if err := ss.authorise(); err != nil {
			text, level := explain(ss.Session, err)
			ss.Log.Log(ss.ctx, max(level, slog.LevelInfo), "token refused", "client", ss.conn.RemoteAddr(), "err", err)
			ss.complain(text)
			return
		}
	}
	ss.tokens = nil
	cmd, err := parseCommand(exec.Command)
	var refused *refusedCommand
	if errors.As(err, &refused) {
		ss.Log.Info("command refused", "command", clip(exec.Command))
		ss.complain(refused.msg)
		status = refused.status
		return
	}
	if !ss.server.addSession(ss) {
		ss.complain("the server is shutting down; try again later")
		return
	}
	defer ss.server.removeSession(ss)
	if err := ss.setSettings(); err != nil {
		ss.Log.Info("session refused", "err", err)
		ss.complain(err.Error())
		return
	}
	ss.proto = cmd.protocol
	ss.Sight = ss.server.newSight(ss.Client.Account.ID, ss.Settings.TrustedPublicKeys)
	ss.leases = ss.Sight.NewLease()
	defer func() { ss.leases.Release() }() // of the last lease: a collection begins another
	ss.Log.Debug("session begins", "proto", cmd.protocol, "by", ss.Client.who())
	switch cmd.protocol {
	case serveProtocol:
		status = serveServe(ss, cmd.write)
	case shellProtocol:
		status = ss.runShell(cmd.words)
	case apiProtocol:
		status = ss.runAPI(cmd.words)
	default:
		status = serveWorker(ss)
	}
	ss.Log.Debug("session ends", "status", status)
}

// complain writes one line to the channel's stderr; for api it is JSON.
func (ss *session) complain(msg string) {
	if ss.json {
		ss.writeFailure(msg)
		return
	}
	_, _ = io.WriteString(ss.ch.Stderr(), "nbd: error: "+printable(msg)+"\n") // the client may be gone
}

// exit ends the channel with an exit status; the client may be gone.
func (ss *session) exit(status int) {
	_, _ = ss.ch.SendRequest("exit-status", false, gossh.Marshal(struct{ Status uint32 }{uint32(status)}))
	_ = ss.ch.Close()
}

// beginWork counts a piece of work that Close waits for; it reports false if
// the server takes none.
func (s *Server) beginWork() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state != serving {
		return false
	}
	s.work.Add(1)
	return true
}

func (s *Server) addSession(ss *session) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state != serving {
		return false
	}
	s.sessions[ss] = struct{}{}
	return true
}

func (s *Server) removeSession(ss *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.sessions, ss)
	s.checkIdleLocked()
}

// begin marks a session busy with a request; it reports false if the server
// takes no more.
func (ss *session) begin() bool {
	ss.restrictSight()
	ss.server.mu.Lock()
	defer ss.server.mu.Unlock()
	ss.busy = ss.server.state == serving
	return ss.busy
}

// finish marks the end of a request; it reports false if the server takes no
// more.
func (ss *session) finish() bool {
	if err := ss.leases.Shrink(ss.ctx); err != nil {
		ss.Log.Warn("cannot shrink the session's lease", "err", err)
	}
	ss.server.mu.Lock()
	defer ss.server.mu.Unlock()
	ss.busy = false
	return ss.server.state == serving
}

// endIfIdleLocked ends a session that is between two requests.
func (ss *session) endIfIdleLocked() {
	if !ss.busy && ss.server.state != closed {
		ss.server.work.Go(func() { ss.exit(exitError) })
	}
}

// abandon closes the connection of a session that should have ended.
func (ss *session) abandon() {
	if ss.ctx.Err() == nil {
		ss.conn.abort()
	}
}
