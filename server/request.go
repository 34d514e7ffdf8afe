package server

// A request is one request for a build, from its arrival to its answer.
type request struct{}
