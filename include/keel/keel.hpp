// SPDX-License-Identifier: MIT
//
// All that a host needs to run a model on the CPU:
//
//     const auto engine = keel::engine::open("kimi-linear.gguf");  // immutable, shareable between threads
//     auto session = engine.start({.context = 32768});             // one timeline: tokens + state; movable, copyable
//     keel::sampler sample{{.temperature = 0.7f, .seed = 1}};
//     session.feed(engine.tokenize("Once upon a time"));
//     while (const auto token = session.next(sample)) std::cout << engine.text(*token) << std::flush;
#pragma once

#include <keel/backend/cpu.hpp>       // defines: cpu
#include <keel/engine.hpp>            // defines: basic_engine, engine_options
#include <keel/fwd.hpp>               // defines: engine, session
#include <keel/sampler.hpp>           // defines: sampler, sampler_options
#include <keel/session.hpp>           // defines: basic_session, session_options
#include <keel/text/text_stream.hpp>  // defines: text_stream
